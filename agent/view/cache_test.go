package view_test

import (
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/agent/view"
)

// FuzzLoad gives Load files with a good seal and any content: it takes them or
// ignores them.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"format":1,"position":{"generation":"g","revision":1},"alive":"2026-01-01T00:00:00Z","topics":[{"kind":"node","items":[{"key":"spec","revision":1,"json":"e30="}]}]}`))
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`{"format":1,"topics":[{"items":null},{"items":[{}]}]}`))
	f.Add([]byte(``))
	dir, err := statedir.Open(filepath.Join(f.TempDir(), "agent"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := dir.Write("view.json", data); err != nil {
			t.Fatal(err)
		}
		v := view.New(view.Config{Log: slog.New(slog.DiscardHandler), Dir: dir})
		if err := v.Load(); err != nil {
			t.Fatalf("Load of a readable file: %v", err)
		}
		for range v.Snapshot().Items(view.Node()) {
			if !v.Snapshot().Has(view.Node()) {
				t.Fatal("items of a topic that is not held")
			}
		}
	})
}
