package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// systemFiles say what the kernel allows and has: facts without names of users,
// files or environments.
var systemFiles = []string{
	"/etc/os-release", "/proc/version", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/proc/self/limits", "/proc/net/sockstat", "/proc/net/snmp",
	"/proc/net/netstat", "/proc/sys/fs/file-max", "/proc/sys/fs/file-nr", "/proc/sys/net/core/somaxconn", "/proc/sys/net/ipv4/ip_local_port_range",
	"/proc/sys/net/ipv4/tcp_tw_reuse", "/proc/sys/net/ipv4/tcp_max_syn_backlog", "/proc/sys/net/netfilter/nf_conntrack_count",
	"/proc/sys/net/netfilter/nf_conntrack_max", "/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io",
}

// units are whose logs are wanted.
var units = []string{"meshd-agent", "mesh-proxy", "meshd-server"}

const (
	logLines = "2000"
	// logWait bounds the reading of one log.
	logWait = 5 * time.Second
)

// debugSystem adds what this machine is, and what its services have logged.
func debugSystem(ctx context.Context, b *bundle) {
	for _, path := range systemFiles {
		data, err := os.ReadFile(path) //nolint:gosec // a list of ours
		b.add("system/"+filepath.Base(path), data, err)
	}
	journal, err := exec.LookPath("journalctl")
	if err != nil {
		b.skip("log", err)
		return
	}
	for _, unit := range units {
		limited, cancel := context.WithTimeout(ctx, logWait)
		data, err := exec.CommandContext(limited, journal, "--unit", unit, "--lines", logLines, "--no-pager", "--quiet", "--output", "short-iso").Output() //nolint:gosec // a list of ours
		cancel()
		if err == nil && len(data) == 0 {
			err = fmt.Errorf("the journal has nothing of unit %s, or this user may not see it", unit)
		}
		b.add("log/"+unit+".txt", data, err)
	}
}

// debugProcess adds what the kernel knows of a process.
func debugProcess(b *bundle, dir string, pid int) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	for _, name := range []string{"status", "limits", "stat", "smaps_rollup", "cgroup", "net/sockstat"} {
		data, err := os.ReadFile(filepath.Join(proc, name)) //nolint:gosec // a list of ours
		b.add(dir+"/"+filepath.Base(name), data, err)
	}
	files, err := os.ReadDir(filepath.Join(proc, "fd"))
	b.add(dir+"/open-files", []byte(strconv.Itoa(len(files))+"\n"), err)
}
