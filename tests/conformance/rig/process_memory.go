package rig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// PrivateMemory returns how many bytes would be free if the process and all
// that descend from it were not there.
func PrivateMemory(pid int) (uint64, error) {
	pids, err := Family(pid)
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, pid := range pids {
		private, err := privateOf(pid)
		if err != nil {
			return 0, err
		}
		sum += private
	}
	return sum, nil
}

// Family returns a process and all that descend from it.
func Family(pid int) ([]int, error) {
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
			more, err := Family(n)
			if err != nil {
				return nil, err
			}
			out = append(out, more...)
		}
	}
	return out, nil
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
