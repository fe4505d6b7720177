package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"net/http"
	"time"

	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

const (
	defaultHeartbeat = 15 * time.Second
	// maxWatches bounds the watches of one server.
	maxWatches = 512
	// watchPatience is how long a reader may take to make room; then it is cut, and
	// may come again for the newest state.
	watchPatience = 30 * time.Second
	// watchChunk is how much is gathered before it is sent.
	watchChunk = 128 << 10
)

// A follower knows what one watch was sent.
type follower interface {
	// reset returns everything.
	reset(*state.Snapshot) []client.Item
	// step returns what is to be sent after changes that lead to the snapshot.
	step(*state.Snapshot, []state.Change) (puts []client.Item, deletes []client.Item)
}

// following is a follower of one table. It holds a hash of what was sent per
// resource, so that nothing is sent twice, and what is no longer selected is
// told to be gone.
type following[K comparable, V interface{ Validate() error }] struct {
	table *table[K, V]
	sel   selection
	seed  maphash.Seed
	sent  map[K]uint64
}

func (t *table[K, V]) follow(sel selection) follower {
	return &following[K, V]{table: t, sel: sel, seed: maphash.MakeSeed()}
}

func (f *following[K, V]) reset(s *state.Snapshot) []client.Item {
	f.sent = make(map[K]uint64)
	items := f.table.builtins(f.sel)
	for k := range f.table.table.All(s) {
		if item, ok := f.changed(s, k); ok {
			items = append(items, item)
		}
	}
	return items
}

// changed returns the resource if it is selected and not as it was sent.
func (f *following[K, V]) changed(s *state.Snapshot, k K) (client.Item, bool) {
	rec, ok := f.table.table.Get(s, k)
	if !ok || !f.table.selected(f.sel, k, rec.Value) {
		return client.Item{}, false
	}
	item := f.table.item(s, k, rec)
	var h maphash.Hash
	h.SetSeed(f.seed)
	maphash.WriteComparable(&h, item.Revision)
	_, _ = h.Write(item.Spec)   // a hash takes everything
	_, _ = h.Write(item.Status) // likewise
	sum := h.Sum64()
	if old, was := f.sent[k]; was && old == sum {
		return client.Item{}, false
	}
	f.sent[k] = sum
	return item, true
}

func (f *following[K, V]) step(s *state.Snapshot, changes []state.Change) (puts, deletes []client.Item) {
	for _, k := range f.touched(s, changes) {
		if rec, ok := f.table.table.Get(s, k); ok && f.table.selected(f.sel, k, rec.Value) {
			if item, ok := f.changed(s, k); ok {
				puts = append(puts, item)
			}
			continue
		}
		if _, was := f.sent[k]; was {
			delete(f.sent, k)
			deletes = append(deletes, client.Item{Kind: f.table.name, Name: f.table.show(k), Ref: f.table.ref(k)})
		}
	}
	return puts, deletes
}

// touched lists the resources that changes may concern, each once.
func (f *following[K, V]) touched(s *state.Snapshot, changes []state.Change) []K {
	var keys []K
	seen := map[K]bool{}
	add := func(k K) {
		if !seen[k] {
			seen[k] = true
			keys = append(keys, k)
		}
	}
	for _, c := range changes {
		if k, ok := f.table.table.Key(c); ok {
			add(k)
		} else if f.table.touched != nil {
			for _, k := range f.table.touched(s, c) {
				add(k)
			}
		}
	}
	return keys
}

// watch sends the state and then what changes, as server-sent events, until the
// caller leaves, may no longer see it, or the server stops.
func (a *API) watch(c *call, s *state.Snapshot, f follower) (any, error) {
	leave, err := a.takeWatch()
	if err != nil {
		return nil, err
	}
	defer leave()
	e := newEvents(c.out)
	defer e.release()
	e.state(s, f)
	heartbeat := time.NewTicker(a.cfg.Heartbeat)
	defer heartbeat.Stop()
	shown := c.who.Rights // what was sent was chosen by
	for e.flush() == nil {
		changed := false
		expired, stop := c.expired(a.cfg.Now())
		select {
		case <-a.cfg.State.Changed(s):
			changed = true
		case <-heartbeat.C:
			e.buffer.WriteString(": alive\n\n")
		case <-expired:
		case <-c.Context().Done():
			stop()
			return written{}, nil
		case <-a.ending:
			stop()
			return written{}, nil
		}
		stop()
		if c.cut = c.allowed(); c.cut != nil {
			e.end(c.cut)
			return written{}, nil
		}
		if !changed {
			continue
		}
		newest, changes, ok := a.cfg.State.Changes(s)
		if s = newest; ok && shown.SameBook(c.who.Rights) {
			e.changes(s, f, changes)
		} else {
			e.state(s, f) // restored from a snapshot, too far behind, or other policies
		}
		shown = c.who.Rights
	}
	return written{}, nil
}

// expired returns a channel that gets something when the caller's token ends, if it
// does, and what frees it.
func (c *call) expired(now time.Time) (<-chan time.Time, func()) {
	if c.who.Expires.IsZero() {
		return nil, func() {}
	}
	timer := time.NewTimer(max(0, c.who.Expires.Sub(now)))
	return timer.C, func() { timer.Stop() }
}

// end tells why a stream ends.
func (e *events) end(err error) {
	e.buffer.Reset()
	e.event(client.EventError, toError(err))
	_ = e.flush() // it ends either way
}

// takeWatch takes a place among the watches, which leave gives back.
func (a *API) takeWatch() (leave func(), err error) {
	select {
	case a.watches <- struct{}{}:
		return func() { <-a.watches }, nil
	default:
		return nil, &client.Error{
			Code: client.CodeUnavailable, Message: fmt.Sprintf("this server has %d watches already", maxWatches), Next: "end some, or list instead",
		}
	}
}

// events writes server-sent events (WHATWG HTML, section 9.2).
type events struct {
	out    http.ResponseWriter
	flow   *http.ResponseController
	buffer bytes.Buffer
	err    error
}

func newEvents(out http.ResponseWriter) *events {
	out.Header().Set("Content-Type", "text/event-stream")
	out.Header().Set("Cache-Control", "no-store")
	out.WriteHeader(http.StatusOK)
	return &events{out: out, flow: http.NewResponseController(out)}
}

// release leaves the connection as it was found.
func (e *events) release() { _ = e.flow.SetWriteDeadline(time.Time{}) }

func (e *events) state(s *state.Snapshot, f follower) {
	at := map[string]any{"position": s.Position()}
	e.event(client.EventReset, at)
	for _, i := range f.reset(s) {
		e.event(client.EventPut, i)
	}
	e.event(client.EventPosition, at)
}

func (e *events) changes(s *state.Snapshot, f follower, changes []state.Change) {
	puts, deletes := f.step(s, changes)
	for _, i := range deletes {
		e.event(client.EventDelete, map[string]any{"kind": i.Kind, "name": i.Name, "ref": i.Ref})
	}
	for _, i := range puts {
		e.event(client.EventPut, i)
	}
	if len(puts)+len(deletes) > 0 {
		e.event(client.EventPosition, map[string]any{"position": s.Position()})
	}
}

// event adds an event. JSON that Encode writes is one line, as data has to be: a
// spec is stored with the line breaks that it came with, and is compacted here.
func (e *events) event(name string, data any) {
	fmt.Fprintf(&e.buffer, "event: %s\ndata: ", name)
	enc := json.NewEncoder(&e.buffer)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(data) // shapes of our own and valid JSON: they always can be
	e.buffer.WriteByte('\n')
	if e.buffer.Len() > watchChunk {
		_ = e.flush() // kept in e.err
	}
}

// flush sends what is there. The first error is final.
func (e *events) flush() error {
	if e.err != nil || e.buffer.Len() == 0 {
		return e.err
	}
	if e.err = e.flow.SetWriteDeadline(time.Now().Add(watchPatience)); e.err == nil {
		_, e.err = e.out.Write(e.buffer.Bytes())
	}
	if e.err == nil {
		e.err = e.flow.Flush()
	}
	e.buffer.Reset()
	return e.err
}
