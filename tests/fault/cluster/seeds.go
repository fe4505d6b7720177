package cluster

import (
	"bufio"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// seedsFile keeps the seeds that failed: lines of a test's name and a number. They
// run first the next time, and stay as long as they are of use.
const seedsFile = "seeds"

// Run is one run of a row of the fault matrix.
type Run struct {
	*testing.T
	// Random decides what the row does.
	Random *rand.Rand
}

// Row runs a test with each seed that is kept for it, and with new ones. What a row
// does is decided by its random numbers; when it happens is not.
func Row(t *testing.T, do func(r *Run)) {
	t.Helper()
	kept, err := keptSeeds(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	seeds := kept
	for range envInt(t, "FAULTRUNS", 1) {
		seeds = append(seeds, uint64(time.Now().UnixNano())%1e9)
	}
	for i, seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Cleanup(func() { // the last one; a row may end in the middle
				if t.Failed() && i >= len(kept) {
					t.Logf("seed %d is kept in the file %s", seed, seedsFile)
					keepSeed(t, seed)
				}
			})
			do(&Run{T: t, Random: rand.New(rand.NewPCG(seed, 0))})
		})
		if t.Failed() {
			return
		}
	}
}

func keptSeeds(test string) ([]uint64, error) {
	f, err := os.Open(seedsFile)
	if err != nil {
		return nil, fmt.Errorf("read the seeds that failed: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	var seeds []uint64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, number, ok := strings.Cut(lines.Text(), " ")
		if !ok || name != test {
			continue
		}
		seed, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read the seeds that failed: %q: %w", lines.Text(), err)
		}
		seeds = append(seeds, seed)
	}
	return seeds, nil
}

func keepSeed(t *testing.T, seed uint64) {
	t.Helper()
	f, err := os.OpenFile(seedsFile, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		t.Error(err)
		return
	}
	test, _, _ := strings.Cut(t.Name(), "/")
	if _, err := fmt.Fprintf(f, "%s %d\n", test, seed); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func envInt(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: write a number from 1 on", name, text)
	}
	return n
}

// Rounds counts from 0: at least to n, and on until FAULTTIME is over.
func (r *Run) Rounds(n int) iter.Seq[int] {
	r.Helper()
	var long time.Duration
	if text := os.Getenv("FAULTTIME"); text != "" {
		var err error
		if long, err = time.ParseDuration(text); err != nil {
			r.Fatalf("FAULTTIME=%q: write a duration such as 10m", text)
		}
	}
	end := time.Now().Add(long)
	return func(yield func(int) bool) {
		for i := 0; i < n || time.Now().Before(end); i++ {
			if !yield(i) {
				return
			}
		}
	}
}
