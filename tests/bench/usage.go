package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// usage is CPU time up to a moment: that of the whole machine, what of it the
// hypervisor gave to others, and what this benchmark took.
type usage struct {
	all, busy, stolen, ours time.Duration
}

// userHZ is the unit of /proc/stat: 100 on every architecture that Go runs on
// (proc(5), sysconf(_SC_CLK_TCK)).
const userHZ = 100

// usage looks at the machine, and at all processes of the field, this one, and
// those that it has waited for.
func (f *field) usage() (usage, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return usage{}, err
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	fields := bytes.Fields(line)
	if len(fields) < 9 || string(fields[0]) != "cpu" {
		return usage{}, errors.New("read /proc/stat: it does not begin with cpu and eight numbers")
	}
	var out usage
	for i, field := range fields[1:9] { // user nice system idle iowait irq softirq steal
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return usage{}, fmt.Errorf("read /proc/stat: %w", err)
		}
		d := time.Duration(n) * (time.Second / userHZ)
		out.all += d
		switch i {
		case 3, 4:
		case 7:
			out.stolen += d
		default:
			out.busy += d
		}
	}
	for _, p := range f.processes {
		select {
		case <-p.Done():
			continue // it counts as another's, and the report says that it failed
		default:
		}
		pids, err := rig.Family(p.PID())
		if err != nil {
			return usage{}, err
		}
		cpu, err := load.CPU(pids)
		if err != nil {
			return usage{}, err
		}
		out.ours += cpu
	}
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var ru unix.Rusage
		if err := unix.Getrusage(who, &ru); err != nil {
			return usage{}, fmt.Errorf("getrusage: %w", err)
		}
		out.ours += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	return out, nil
}

// since is what others took between two moments.
func (u usage) since(before usage, s setting) others {
	all := max(1, u.all-before.all)
	return others{
		Setting:   s,
		Processes: max(0, float64((u.busy-before.busy)-(u.ours-before.ours))/float64(all)),
		Stolen:    float64(u.stolen-before.stolen) / float64(all),
	}
}
