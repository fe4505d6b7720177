package load

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

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

// Memory is what processes hold, in bytes.
type Memory struct {
	// Private is what they have written: anonymous pages and shared memory,
	// Pss_Anon and Pss_Shmem of /proc/PID/smaps_rollup. What processes of one
	// family share counts once.
	Private uint64
	// File is pages of the program's file and of libraries, those of the process
	// that has the most: the rest of Rss. The kernel may drop them, and they are
	// there once however many processes run the program. (Private_Clean and
	// Private_Dirty would have them in while only one does, and for some seconds
	// after the file was written.)
	File uint64
}

// MemoryOf returns what processes hold now.
func MemoryOf(pids []int) (Memory, error) {
	var sum Memory
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return Memory{}, err
		}
		rollup, err := fields(data)
		if err != nil {
			return Memory{}, fmt.Errorf("read /proc/%d/smaps_rollup: %w", pid, err)
		}
		shared := rollup["Pss_Shmem"]
		sum.Private += rollup["Pss_Anon"] + shared + rollup["Private_Hugetlb"]
		sum.File = max(sum.File, rollup["Rss"]-min(rollup["Rss"], rollup["Anonymous"]+shared))
	}
	return sum, nil
}

// fields reads lines such as "Rss: 12 kB" as bytes.
func fields(rollup []byte) (map[string]uint64, error) {
	out := map[string]uint64{}
	for line := range bytes.Lines(rollup) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		text, ok := bytes.CutSuffix(bytes.TrimSpace(value), []byte(" kB"))
		if !ok {
			continue // the first line is of addresses
		}
		kib, err := strconv.ParseUint(string(text), 10, 64)
		if err != nil {
			return nil, err
		}
		out[string(name)] = kib << 10
	}
	if _, ok := out["Pss_Anon"]; !ok {
		return nil, errors.New("no Pss_Anon, which Linux has since 5.4")
	}
	return out, nil
}
