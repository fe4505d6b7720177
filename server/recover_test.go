package server_test

import (
	"cmp"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/meshd/meshd/server"
)

// TestRecover loses two of three servers for ever: the third becomes the cluster,
// with all that it has, and the others come back empty.
func TestRecover(t *testing.T) {
	t.Parallel()
	c := newTrio(t)
	for i := range c.dirs {
		c.start(t, i)
	}
	for i := range c.dirs {
		c.await(t, i)
	}
	if code := call(t, c.running[0].local(), http.MethodPut, "http://x/v1/nodes/kept", "", `{"name":"kept"}`, nil); code != http.StatusOK {
		t.Fatalf("write: %d", code)
	}
	if _, err := server.Inspect(t.Context(), c.config(1)); err == nil {
		t.Error("the state of a running server was read")
	}
	for i := range c.dirs {
		c.running[i].stop()
	}
	kept, found := c.newest(t)
	if len(found.Members) != 3 || found.Last == 0 || found.Term == 0 {
		t.Errorf("the stopped server: %+v", found)
	}
	if err := found.Recover(); err != nil {
		t.Fatal(err)
	}
	config := c.config(kept)
	if found, err := server.Inspect(t.Context(), config); err != nil || len(found.Members) != 1 {
		t.Fatalf("after the recovery: %+v, %v", found, err)
	}
	c.start(t, kept)
	c.await(t, kept)
	get := func(i int) int {
		return call(t, c.running[i].local(), http.MethodGet, "http://x/v1/nodes/kept", "", "", nil)
	}
	if code := get(kept); code != http.StatusOK {
		t.Errorf("what was written before: %d", code)
	}
	for i := range c.dirs {
		if i == kept {
			continue
		}
		if err := os.RemoveAll(filepath.Join(c.dirs[i], "store")); err != nil {
			t.Fatal(err)
		}
		c.start(t, i)
		c.await(t, i)
		if code := get(i); code != http.StatusOK {
			t.Errorf("through server %d, which came back empty: %d", i+1, code)
		}
	}
	var members struct {
		Members []struct{ Name string }
	}
	if code := call(t, c.running[kept].local(), http.MethodGet, "http://x/v1/status", "", "", &members); code != http.StatusOK {
		t.Fatalf("status: %d", code)
	}
	var names []string
	for _, m := range members.Members {
		names = append(names, m.Name)
	}
	if slices.Sort(names); !slices.Equal(names, []string{"server-1", "server-2", "server-3"}) {
		t.Errorf("members: %v", names)
	}
	config.DataDir = privateDir(t)
	if _, err := server.Inspect(t.Context(), config); !errors.Is(err, server.ErrNoState) {
		t.Errorf("an empty directory: %v", err)
	}
}

// newest returns the stopped server that has all that any of them has.
func (c *trio) newest(t *testing.T) (which int, best server.Recovery) {
	t.Helper()
	for i := range c.dirs {
		found, err := server.Inspect(t.Context(), c.config(i))
		if err != nil {
			t.Fatal(err)
		}
		if cmp.Or(cmp.Compare(found.Term, best.Term), cmp.Compare(found.Last, best.Last)) > 0 {
			which, best = i, found
		}
	}
	return which, best
}
