package disk_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/agent/statedir"
)

// What an agent keeps for the time without servers is refused whole when any bit of
// it is flipped, or when it was cut.
func TestAgentCache(t *testing.T) {
	t.Parallel()
	dir, err := statedir.Open(filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	plan := make([]byte, 3000)
	rnd := rand.New(rand.NewPCG(3, 3))
	for i := range plan {
		plan[i] = byte(rnd.Uint32())
	}
	if err := dir.Write("plan", plan); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(dir.Path("plan"))
	if err != nil {
		t.Fatal(err)
	}
	damaged := func(what string, at int, content []byte) {
		t.Helper()
		if err := os.WriteFile(dir.Path("plan"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := dir.Read("plan"); !errors.Is(err, statedir.ErrCorrupt) {
			t.Errorf("%s at byte %d: %d bytes are read, %v", what, at, len(got), err)
		}
	}
	for at := range whole {
		flipped := append([]byte{}, whole...)
		flipped[at] ^= 1 << rnd.IntN(8)
		damaged("flipped", at, flipped)
	}
	for range 100 {
		at := rnd.IntN(len(whole))
		damaged("cut", at, whole[:at])
	}
	if err := os.WriteFile(dir.Path("plan"), whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := dir.Read("plan"); err != nil || string(got) != string(plan) {
		t.Errorf("without damage: %d bytes, %v", len(got), err)
	}
}
