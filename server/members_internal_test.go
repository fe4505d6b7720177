package server

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// TestAnnounce tells what becomes of the record of srv-1 while the member srv-1.new
// runs under that name: before it announces itself, and after what others write then.
func TestAnnounce(t *testing.T) {
	t.Parallel()
	own := state.Server{ID: "srv-1.new", Address: "10.0.0.11:7400", FeatureLevel: 1}
	without := func(removed ...string) *state.Server { return &state.Server{FeatureLevel: 1, Removed: removed} }
	with := func(removed ...string) *state.Server {
		record := own
		record.Removed = removed
		return &record
	}
	for name, c := range map[string]struct{ before, during, want *state.Server }{
		"the first of its name":          {want: with()},
		"one that was removed before":    {before: without("srv-1.new"), want: without("srv-1.new")},
		"one that is removed meanwhile":  {during: without("srv-1.new"), want: without("srv-1.new")},
		"its predecessor was removed":    {before: without("srv-1.old"), want: with("srv-1.old")},
		"its predecessor is removed now": {during: without("srv-1.old"), want: with("srv-1.old")},
		"an older snapshot is restored":  {during: &state.Server{ID: "srv-1.old", FeatureLevel: 1}, want: with()},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := &member{
				Server: &Server{log: slog.New(slog.DiscardHandler)}, membership: &membership{id: own.ID}, name: "srv-1",
				state: state.New(store.NewMemory(), slog.New(slog.DiscardHandler)),
			}
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error, 2)
			go func() { done <- m.state.Run(ctx) }()
			<-m.state.Ready()
			others := func(record *state.Server) {
				if record == nil {
					return
				}
				if _, err := m.state.Update(ctx, func(tx *state.Tx) error { return state.Servers.Put(tx, m.name, *record) }); err != nil {
					t.Fatal(err)
				}
			}
			others(c.before)
			go func() { done <- m.announce(ctx, own) }()
			synctest.Wait() // it has nothing to do any more
			others(c.during)
			synctest.Wait()
			have, ok := state.Servers.Get(m.state.Snapshot(), m.name)
			if !ok || have.Err != nil {
				t.Fatalf("%s: no record, %v", name, have.Err)
			}
			if diff := cmp.Diff(*c.want, have.Value); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			stop()
			for range 2 {
				if err := <-done; err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}
