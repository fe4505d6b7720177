package rpc

import (
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

// Kinds of topics; meshpb.Topic describes them.
const (
	topicRoots      = "roots"
	topicNode       = "node"
	topicIntentions = "intentions"
	topicUpstream   = "upstream"
	topicServers    = "servers"
)

// stream is one agent's Sync.
type stream struct {
	caller caller
	hello  *meshpb.Hello
	since  time.Time
	// admitted refuses the caller if its node is gone or is another's by now.
	admitted func(state.Reader) error

	// subs is guarded by feeds.mu.
	subs map[topicKey]*subscription

	mu    sync.Mutex
	dirty map[*subscription]struct{}
	spare map[*subscription]struct{} // empty, to be the next dirty
	all   bool                       // every subscription, and whether the node is still admitted
	taken bool                       // what was dirty is being made into a batch
	alive bool                       // a heartbeat wants its answer
	// asked says that the agent has subscribed: what comes now is its first content.
	asked bool
	lease grant
	// pending is when the first of what is dirty changed, taken that of what is being
	// sent; zero if nothing is.
	pending, sending time.Time
	// told is the position of the newest batch: nothing that this agent may see
	// has changed since, unless something is dirty.
	told   catalog.Position
	reason error
	ended  bool

	// work has one token whenever there may be something to send.
	work chan struct{}
	done chan struct{}
}

func newStream(c caller, hello *meshpb.Hello) *stream {
	return &stream{
		caller: c, hello: hello, since: time.Now(),
		subs:  make(map[topicKey]*subscription),
		dirty: make(map[*subscription]struct{}), spare: make(map[*subscription]struct{}),
		work: make(chan struct{}, 1),
		done: make(chan struct{}),
	}
}

// mark notes that a subscription may have something to send. Its size is bounded
// by the number of topics, however slow the agent reads.
func (st *stream) mark(sub *subscription) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.dirty[sub] = struct{}{}
	st.stamp()
	st.wake()
}

func (st *stream) markAll() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.all = true
	st.stamp()
	st.wake()
}

// stamp notes when the oldest change came that was not sent. mu is held.
func (st *stream) stamp() {
	if st.pending.IsZero() {
		st.pending = time.Now()
	}
}

// heartbeat asks for an Alive after all that is to be sent by now.
func (st *stream) heartbeat() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.alive = true
	st.wake()
}

// subscribed notes that the agent has said what it wants.
func (st *stream) subscribed() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.asked = true
	st.wake()
}

func (st *stream) isSubscribed() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.asked
}

func (st *stream) wake() {
	select {
	case st.work <- struct{}{}:
	default:
	}
}

// end closes the stream for a reason; the first one counts.
func (st *stream) end(reason error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.ended {
		st.ended, st.reason = true, reason
		close(st.done)
	}
}

func (st *stream) why() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.reason
}

// take returns what is to be done and forgets it.
func (st *stream) take() (dirty map[*subscription]struct{}, all, alive bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	dirty, all, alive = st.dirty, st.all, st.alive
	st.dirty, st.all, st.alive, st.taken = st.spare, false, false, true
	st.pending, st.sending = time.Time{}, st.pending
	return dirty, all, alive
}

// made notes what became of what take returned: a batch at a position, or
// nothing to send. It takes dirty back.
func (st *stream) made(dirty map[*subscription]struct{}, batch *meshpb.Batch, at catalog.Position) {
	clear(dirty)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.spare, st.taken = dirty, false
	if batch != nil {
		st.told = at
	} else {
		st.sending = time.Time{}
	}
}

// delivered notes that the batch that was made last is on its way.
func (st *stream) delivered(delays *delays) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.sending.IsZero() {
		delays.add(time.Since(st.sending))
	}
	st.sending = time.Time{}
}

// behind tells how long the oldest change waits that was not sent, and the position
// before it; 0 if nothing waits.
func (st *stream) behind(now time.Time) (d time.Duration, told catalog.Position) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, since := range []time.Time{st.sending, st.pending} {
		if !since.IsZero() {
			return now.Sub(since), st.told
		}
	}
	return 0, st.told
}

// settled returns the position of the newest batch, and whether that was all
// there was to tell.
func (st *stream) settled() (told catalog.Position, all bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.told, !st.taken && !st.all && len(st.dirty) == 0
}

type topicKey struct{ kind, name, source string }

// gate is what a subscriber may see of a set.
type gate uint8

const (
	gateUnset  gate = iota // nothing was sent yet
	gateClosed             // not the caller's to see
	gateDenied             // no intention allows it: the service, but no instances
	gateOpen
)

// subscription is one topic of one stream. gate and cursor are written by the
// stream's sender under feeds.mu for reading, or by anybody under feeds.mu.
type subscription struct {
	stream      *stream
	topic       *meshpb.Topic
	source      catalog.Name
	destination catalog.Name

	set    *itemset
	gate   gate
	cursor uint64
}

func (sub *subscription) key() topicKey {
	return topicKey{sub.topic.GetKind(), sub.topic.GetName(), sub.topic.GetSource()}
}

func newSubscription(st *stream, topic *meshpb.Topic) (*subscription, error) {
	sub := &subscription{stream: st, topic: topic}
	var err error
	switch topic.GetKind() {
	case topicIntentions, topicUpstream:
		if sub.destination, err = catalog.ParseName(topic.GetName()); err != nil {
			return nil, fmt.Errorf("name: %w", err)
		}
	}
	if topic.GetKind() == topicUpstream {
		if sub.source, err = catalog.ParseName(topic.GetSource()); err != nil {
			return nil, fmt.Errorf("source: %w", err)
		}
	}
	return sub, nil
}

// collect returns what the stream has to send to be at the position that it
// returns, which is nothing if batch is nil.
func (f *feeds) collect(st *stream) (batch *meshpb.Batch, at catalog.Position, alive bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	dirty, all, alive := st.take()
	defer func() { st.made(dirty, batch, at) }()
	at = f.snapshot.Position()
	if all {
		// Not at f.snapshot: it may be older than the node itself.
		if err := st.admitted(f.state.Snapshot()); err != nil {
			return nil, at, alive, err
		}
		for _, sub := range st.subs {
			dirty[sub] = struct{}{}
		}
	}
	if len(dirty) == 0 {
		return nil, at, alive, nil
	}
	out := &meshpb.Batch{Position: toWire(at)}
	node, known := state.Nodes.Get(f.snapshot, st.caller.node)
	for sub := range dirty {
		if st.subs[sub.key()] != sub {
			continue // it was dropped since
		}
		want := gateClosed
		if known && node.Err == nil {
			want = f.gate(sub, node.Value)
		}
		f.add(out, sub, want)
	}
	if len(out.GetReset_()) == 0 && len(out.GetItems()) == 0 {
		return nil, at, alive, nil
	}
	return out, at, alive, nil
}

// add puts what is new of one topic into a batch.
func (f *feeds) add(out *meshpb.Batch, sub *subscription, want gate) {
	if want != sub.gate || sub.cursor < sub.set.floor {
		out.Reset_ = append(out.Reset_, sub.topic)
		f.addAll(out, sub, want)
	} else {
		f.addChanges(out, sub)
	}
	sub.gate, sub.cursor = want, sub.set.seq
}

func (f *feeds) addAll(out *meshpb.Batch, sub *subscription, g gate) {
	switch g {
	case gateOpen:
		for it := range sub.set.all {
			out.Items = append(out.Items, wireItem(sub, it))
		}
	case gateDenied:
		if it := sub.set.get(itemService); it != nil {
			out.Items = append(out.Items, wireItem(sub, it))
		}
		out.Items = append(out.Items, &meshpb.Item{
			Topic: sub.topic, Key: itemDenied, Json: f.deniedJSON(sub), Revision: f.revision(),
		})
	case gateUnset, gateClosed:
	}
}

func (f *feeds) addChanges(out *meshpb.Batch, sub *subscription) {
	if sub.gate == gateClosed {
		return
	}
	from := len(out.GetItems())
	for it := range sub.set.since(sub.cursor) {
		if sub.gate == gateOpen || it.key == itemService {
			out.Items = append(out.Items, wireItem(sub, it))
		}
	}
	slices.Reverse(out.GetItems()[from:])
}

func wireItem(sub *subscription, it *item) *meshpb.Item {
	return &meshpb.Item{Topic: sub.topic, Key: it.key, Json: it.json, Revision: it.revision}
}

func (f *feeds) deniedJSON(sub *subscription) []byte {
	raw, err := json.Marshal(map[string]string{
		"reason": fmt.Sprintf("no intention allows %s to call %s", sub.source.Short(), sub.destination.Short()),
	})
	if err != nil {
		return []byte(`{}`)
	}
	return raw
}

// gate decides what the caller's node may see of a topic: the permissions of its
// record, and what runs on it.
func (f *feeds) gate(sub *subscription, node catalog.Node) gate {
	switch sub.topic.GetKind() {
	case topicRoots, topicNode, topicServers:
		return gateOpen
	case topicIntentions:
		if node.MayRun(sub.destination) || f.snapshot.Runs(sub.stream.caller.node, sub.destination) {
			return gateOpen
		}
	case topicUpstream:
		if !node.MayRun(sub.source) {
			return gateClosed
		}
		if !f.policy(sub.destination).MayAllow(spiffe.Service(f.trustDomain, sub.source.Namespace, sub.source.Name)) {
			return gateDenied
		}
		return gateOpen
	}
	return gateClosed
}
