package main_test

import (
	"os"
	"runtime"
	"strings"
	"testing"

	main "github.com/meshd/meshd/cmd/meshd"
)

// The ballast counts for the collector and takes no memory.
func TestBallast(t *testing.T) {
	runtime.GC()
	before, resident := goal(), anonymous(t)
	held := main.NewServerService(nil)
	runtime.GC()
	if grown := goal() - before; grown < 60<<20 {
		t.Errorf("the heap may grow by %d MiB more before it is collected, want about 64", grown>>20)
	}
	if grown := anonymous(t) - resident; grown > 16<<10 {
		t.Errorf("%d KiB more are resident", grown)
	}
	runtime.KeepAlive(held)
}

func goal() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.NextGC)
}

// anonymous is the process's anonymous memory in KiB.
func anonymous(t *testing.T) int64 {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			var kib int64
			for _, digit := range strings.TrimSuffix(strings.TrimSpace(rest), " kB") {
				kib = 10*kib + int64(digit-'0')
			}
			return kib
		}
	}
	t.Fatal("no RssAnon in /proc/self/status")
	return 0
}
