package feed_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

func TestADamagedCacheIsNotUsed(t *testing.T) {
	s, path, dir := newSigner(t), socketPath(t), filepath.Join(t.TempDir(), "state")
	cache := feed.NewDiskCache(dir)
	must(t, cache.CheckMode())
	parts, err := proxy.Split(s.plan(9, 2))
	must(t, err)
	must(t, cache.SavePlan(parts))
	file := filepath.Join(dir, "plan")
	data, err := os.ReadFile(file)
	must(t, err)
	data[len(data)/2] ^= 0x20
	must(t, os.WriteFile(file, data, 0o600))
	if _, err := cache.Plan(); !errors.Is(err, feed.ErrCorrupt) {
		t.Errorf("Plan = %v, want ErrCorrupt", err)
	}
	_, h, _ := startProxy(t, path, dir)
	a := startAgent(t, path)
	must(t, a.SetPlan("vm-a", s.plan(10, 1)))
	h.wait(t, "the agent's plan", at(10))
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, u := range h.updates {
		if u.Config.Position.Revision == 9 {
			t.Error("the damaged plan was used")
		}
	}
}

func TestDiskCacheModes(t *testing.T) {
	s := newSigner(t)
	parts, err := proxy.Split(s.plan(1, 0))
	must(t, err)
	dir := filepath.Join(t.TempDir(), "a", "state")
	cache := feed.NewDiskCache(dir)
	must(t, cache.CheckMode())
	must(t, cache.SavePlan(parts))
	must(t, cache.SaveKeys([]feed.Key{{ID: spiffe.Service(trustDomain, "default", "web"), Key: []byte("canary")}}))
	for name, want := range map[string]os.FileMode{"": 0o700, "plan": 0o600, "keys": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if info.Mode().Perm() != want {
			t.Errorf("%q has mode %#o, want %#o", name, info.Mode().Perm(), want)
		}
	}
	must(t, cache.CheckMode())
	for _, wider := range []struct {
		name string
		mode os.FileMode
	}{{"", 0o750}, {"keys", 0o640}, {"plan", 0o604}} {
		path := filepath.Join(dir, wider.name)
		info, err := os.Stat(path)
		must(t, err)
		must(t, os.Chmod(path, wider.mode))
		if err := cache.CheckMode(); !errors.Is(err, feed.ErrMode) || !strings.Contains(err.Error(), path) {
			t.Errorf("CheckMode with %q at %#o = %v, want ErrMode", wider.name, wider.mode, err)
		}
		c := feed.NewClient(feed.ClientConfig{Socket: "x", Proxy: "p", Log: slog.New(slog.DiscardHandler), Cache: cache})
		if err := c.Run(t.Context(), newHandler()); !errors.Is(err, feed.ErrMode) {
			t.Errorf("Run = %v, want ErrMode", err)
		}
		must(t, os.Chmod(path, info.Mode().Perm()))
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 2 {
		t.Errorf("saving left files behind: %v", entries)
	}
}
