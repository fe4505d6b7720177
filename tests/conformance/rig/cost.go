package rig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// userHZ is the unit of times in /proc/PID/stat: 100 on every architecture
// that Go runs on (proc(5), sysconf(_SC_CLK_TCK)).
const userHZ = 100

// Cost is what a process has taken, with its children.
type Cost struct {
	// CPU is user and system time so far.
	CPU time.Duration
	// Private is the memory that is gone from the machine only because of it,
	// in bytes, now.
	Private uint64
}

// CostOf returns what a process and its children have taken so far.
func CostOf(pid int) (Cost, error) {
	pids, err := family(pid)
	if err != nil {
		return Cost{}, err
	}
	var sum Cost
	for _, pid := range pids {
		cpu, err := cpuOf(pid)
		if err != nil {
			return Cost{}, err
		}
		private, err := privateOf(pid)
		if err != nil {
			return Cost{}, err
		}
		sum.CPU += cpu
		sum.Private += private
	}
	return sum, nil
}

// family returns a process and all that descend from it.
func family(pid int) ([]int, error) {
	out := []int{pid}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	for _, path := range tasks {
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			return nil, err
		}
		for child := range bytes.FieldsSeq(data) {
			n, err := strconv.Atoi(string(child))
			if err != nil {
				return nil, err
			}
			more, err := family(n)
			if err != nil {
				return nil, err
			}
			out = append(out, more...)
		}
	}
	return out, nil
}

// cpuOf returns utime and stime, fields 14 and 15 of proc(5), of all threads,
// those that have ended included.
func cpuOf(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is a name in parentheses, which may hold anything.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("read /proc/%d/stat: %d fields", pid, len(fields))
	}
	var ticks int64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks * (int64(time.Second) / userHZ)), nil
}

// privateOf returns the bytes of Private_Clean and Private_Dirty.
func privateOf(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	var sum uint64
	for line := range bytes.Lines(data) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch string(name) {
		case "Private_Clean", "Private_Dirty", "Private_Hugetlb":
		default:
			continue
		}
		kib, err := strconv.ParseUint(string(bytes.TrimSuffix(bytes.TrimSpace(value), []byte(" kB"))), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read /proc/%d/smaps_rollup: %w", pid, err)
		}
		sum += kib << 10
	}
	return sum, nil
}
