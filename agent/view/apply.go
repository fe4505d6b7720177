package view

import (
	"errors"
	"fmt"
	"maps"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

// ErrProtocol is wrapped when a server sends what the contract rules out. The
// stream is ended and opened again, which makes the server send everything.
var ErrProtocol = errors.New("the server broke the protocol")

// maxItem bounds one item, far above any noun of the catalog.
const maxItem = 1 << 20

// session is what one stream has brought so far. It is pure: snapshots go in
// and come out.
type session struct {
	wanted map[Topic]bool
	// live are the topics that the server has sent on this stream; only those
	// may be changed without a reset.
	live map[Topic]bool
	// subscribed counts the heartbeats sent before the newest Subscribe, and
	// alives the answers. An Alive beyond the count answers for that set.
	sent, subscribed, alives uint64
}

func newSession() *session {
	return &session{wanted: map[Topic]bool{}, live: map[Topic]bool{}}
}

// subscribe notes that the set was sent.
func (s *session) subscribe(topics []Topic) {
	s.wanted = make(map[Topic]bool, len(topics))
	for _, t := range topics {
		s.wanted[t] = true
	}
	maps.DeleteFunc(s.live, func(t Topic, _ bool) bool { return !s.wanted[t] })
	s.subscribed = s.sent
}

// batch returns the snapshot after b, and whether any item changed.
func (s *session) batch(now *Snapshot, b *meshpb.Batch) (*Snapshot, bool, error) {
	at := positionOf(b.GetPosition())
	if at.Generation == "" {
		return now, false, fmt.Errorf("%w: a batch without a generation", ErrProtocol)
	}
	next := &Snapshot{position: advance(now.Position(), at), topics: map[Topic]*held{}}
	if now != nil {
		maps.Copy(next.topics, now.topics)
	}
	fresh := map[Topic]bool{} // copied in this batch: may be written
	changed := false
	for _, wire := range b.GetReset_() {
		t := topicOf(wire)
		if !s.wanted[t] {
			continue
		}
		s.live[t] = true
		if old := next.topics[t]; old != nil && old.position.After(at) {
			continue // a server that lags: what is held is newer
		}
		next.topics[t] = &held{position: at, items: map[string]item{}}
		fresh[t], changed = true, true
	}
	for _, it := range b.GetItems() {
		t := topicOf(it.GetTopic())
		if !s.wanted[t] {
			continue
		}
		if len(it.GetJson()) > maxItem {
			return now, false, fmt.Errorf("%w: item %q of %d bytes, at most %d are taken", ErrProtocol, it.GetKey(), len(it.GetJson()), maxItem)
		}
		old := next.topics[t]
		switch {
		case !s.live[t] || old == nil:
			return now, false, fmt.Errorf("%w: items of topic %v before its content", ErrProtocol, t)
		case !fresh[t] && old.position.After(at):
			continue
		case !fresh[t] && old.position.Generation != at.Generation:
			return now, false, fmt.Errorf("%w: topic %v changed its generation without a reset", ErrProtocol, t)
		case !fresh[t]:
			next.topics[t] = &held{position: at, items: maps.Clone(old.items)}
			fresh[t] = true
		}
		next.topics[t].put(it)
		changed = true
	}
	s.advanceLive(next, at)
	return next, changed, nil
}

func (h *held) put(it *meshpb.Item) {
	if len(it.GetJson()) == 0 {
		delete(h.items, it.GetKey())
		return
	}
	h.items[it.GetKey()] = item{json: it.GetJson(), revision: it.GetRevision()}
}

// advanceLive moves the topics that this stream keeps up to date.
func (s *session) advanceLive(next *Snapshot, at catalog.Position) {
	for t := range s.live {
		if h := next.topics[t]; h != nil && at.After(h.position) {
			next.topics[t] = &held{position: at, items: h.items}
		}
	}
}

// alive returns the snapshot after an answer to a heartbeat. Once the server
// has answered for the newest subscription, what it did not send on this
// stream is nothing that this host may have or ask for any more: it goes.
// Roots stay, and where the servers are: a server without any is broken or an
// older one, and a host without any is cut off.
func (s *session) alive(now *Snapshot, a *meshpb.Alive) (*Snapshot, bool) {
	s.alives++
	at := positionOf(a.GetPosition())
	next := &Snapshot{position: advance(now.Position(), at), topics: map[Topic]*held{}}
	if now != nil {
		maps.Copy(next.topics, now.topics)
	}
	s.advanceLive(next, at)
	if s.alives <= s.subscribed {
		return next, false
	}
	changed := false
	for t := range next.topics {
		if !s.live[t] && t != Roots() && t != Servers() {
			delete(next.topics, t)
			changed = true
		}
	}
	return next, changed
}

// advance never goes back within a generation.
func advance(held, told catalog.Position) catalog.Position {
	if told.Generation == "" || held.After(told) {
		return held
	}
	return told
}

func positionOf(p *meshpb.Position) catalog.Position {
	return catalog.Position{Generation: p.GetGeneration(), Revision: p.GetRevision()}
}
