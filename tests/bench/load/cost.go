package load

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

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

// CPU returns the user and system time that all threads of the processes have
// taken so far, those that have ended included, to the nanosecond: unlike the
// fields of /proc/PID/stat, which count hundredths of a second.
func CPU(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		// The clock of another process, as clock_getcpuclockid(3) makes its id:
		// the bits of the pid, inverted, above CPUCLOCK_SCHED.
		const sched = 2
		var ts unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		sum += time.Duration(ts.Nano())
	}
	return sum, nil
}

// Private returns the memory that is gone from the machine only because of the
// processes, in bytes: Private_Clean and Private_Dirty (and huge pages) of
// /proc/PID/smaps_rollup.
func Private(pids []int) (uint64, error) {
	var sum uint64
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
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
	}
	return sum, nil
}
