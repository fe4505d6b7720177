package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

const (
	// maxAsks bounds the questions under way at one server.
	maxAsks = 256
	// answerPatience is how long hosts have to answer a question; those that did not
	// are named then.
	answerPatience = 3 * time.Second
	// askInterval is how often hosts that a lasting question concerns by now are
	// looked for.
	askInterval = time.Second
	// foundPatience is how long the others have once a host has found what one looks
	// for: they may know of it, too, but it is hardly missed.
	foundPatience = 300 * time.Millisecond
)

// maxQueue bounds what waits for an agent that does not read.
const maxQueue = 4 * maxAsks

var errStuck = status.Error(codes.ResourceExhausted, "the agent does not read what it is asked")

// ErrAsks is wrapped when too many questions are under way.
var ErrAsks = errors.New("too many watch already")

type watchStream = grpc.BidiStreamingServer[meshpb.WatchAnswer, meshpb.WatchQuery]

// watchers knows which nodes can be asked, and what they are asked.
type watchers struct {
	mu    sync.Mutex
	nodes map[string]*watcher
	asks  map[uint64]*ask
	seq   uint64
}

// watcher is one agent's Watch. watchers.mu guards queue.
type watcher struct {
	caller caller
	queue  []*meshpb.WatchQuery
	work   chan struct{}
	end    context.CancelCauseFunc
	warned bool // only its receiver touches it
}

// ask is a question under way. watchers.mu guards what changes.
type ask struct {
	query  flow.Query
	filter *flow.Filter
	wire   []byte
	box    *flow.Mailbox
	// pending have not answered to the end; starting have not begun to.
	asked, pending, starting map[*watcher]struct{}
	problems                 map[string]string // by node
	begun, done, found       chan struct{}
	hasBegun, isDone, isHere bool
}

func newWatchers() *watchers {
	return &watchers{nodes: map[string]*watcher{}, asks: map[uint64]*ask{}}
}

// settle closes begun and done when it is time.
func (a *ask) settle() {
	if len(a.starting) == 0 && !a.hasBegun {
		a.hasBegun = true
		close(a.begun)
	}
	if len(a.pending) == 0 && !a.isDone && !a.query.Lasting() {
		a.isDone = true
		close(a.done)
	}
}

// put asks the nodes that were not asked yet. mu is held.
func (w *watchers) put(id uint64, a *ask, nodes map[string]bool) {
	for node := range nodes {
		to := w.nodes[node]
		if to == nil {
			continue
		}
		if _, asked := a.asked[to]; asked {
			continue
		}
		a.asked[to], a.pending[to] = struct{}{}, struct{}{}
		if !a.hasBegun {
			a.starting[to] = struct{}{}
		}
		to.send(&meshpb.WatchQuery{Id: id, Query: a.wire})
	}
}

// send queues a message. watchers.mu is held.
func (w *watcher) send(q *meshpb.WatchQuery) {
	if len(w.queue) >= maxQueue {
		w.end(errStuck)
		return
	}
	w.queue = append(w.queue, q)
	select {
	case w.work <- struct{}{}:
	default:
	}
}

// AskLocal puts a question to the nodes connected here that it concerns: those that run, or
// call, the services that it names. It hands emit the answers, of which only those
// are let through that the node may give. A question without an end lasts until ctx
// ends, or emit fails; the first piece that is Caught tells that the hosts have
// begun. Errors wrap flow.ErrQuery, ErrAsks or emit's own.
func (s *Server) AskLocal(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	filter, err := q.Filter()
	if err != nil {
		return fmt.Errorf("ask the hosts: %w", err)
	}
	wire, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("ask the hosts: %w", err)
	}
	a := &ask{
		query: q, filter: filter, wire: wire, box: flow.NewMailbox(q), problems: map[string]string{},
		asked: map[*watcher]struct{}{}, pending: map[*watcher]struct{}{}, starting: map[*watcher]struct{}{},
		begun: make(chan struct{}), done: make(chan struct{}), found: make(chan struct{}),
	}
	w, nodes := s.watchers, s.concerned(q)
	w.mu.Lock()
	if len(w.asks) >= maxAsks {
		w.mu.Unlock()
		return fmt.Errorf("ask the hosts: %w: %d questions are under way", ErrAsks, maxAsks)
	}
	w.seq++
	id := w.seq
	w.asks[id] = a
	w.put(id, a, nodes)
	a.settle()
	w.mu.Unlock()

	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	var tending sync.WaitGroup
	tending.Go(func() {
		defer close(ended)
		s.tend(ctx, id, a)
	})
	err = a.box.Drain(ctx, ended, emit)
	cancel()
	tending.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.asks, id)
	for to := range a.pending {
		to.send(&meshpb.WatchQuery{Id: id})
	}
	return err
}

// tend waits for the hosts to begin, or to answer, and puts a lasting question to
// those that it concerns later. It returns when nothing more will come.
func (s *Server) tend(ctx context.Context, id uint64, a *ask) {
	patience := time.NewTimer(answerPatience)
	defer patience.Stop()
	wait := a.begun
	if !a.query.Lasting() {
		wait = a.done
	}
	found := a.found
	for waiting := true; waiting; {
		select {
		case <-wait:
			waiting = false
		case <-patience.C:
			waiting = false
		case <-found:
			found = nil
			patience.Reset(foundPatience)
		case <-ctx.Done():
			return
		}
	}
	s.watchers.report(a)
	if !a.query.Lasting() {
		return
	}
	tick := time.NewTicker(askInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			nodes := s.concerned(a.query)
			s.watchers.mu.Lock()
			s.watchers.put(id, a, nodes)
			s.watchers.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// report tells how many hosts were asked, and which have not answered.
func (w *watchers) report(a *ask) {
	w.mu.Lock()
	defer w.mu.Unlock()
	late := a.starting
	if !a.query.Lasting() {
		late = a.pending
	}
	for to := range late {
		if a.isHere {
			break // nobody misses them
		}
		a.problems[to.caller.node] = "no answer"
	}
	a.hasBegun = true
	var silent []string
	for _, node := range slices.Sorted(maps.Keys(a.problems)) {
		silent = append(silent, node+": "+a.problems[node])
	}
	a.box.Put(flow.Answer{Caught: true, Hosts: len(a.asked), Silent: silent})
}

// Watchable returns how many nodes can be asked.
func (s *Server) Watchable() int {
	s.watchers.mu.Lock()
	defer s.watchers.mu.Unlock()
	return len(s.watchers.nodes)
}

// concerned returns the nodes that may have seen what a query asks for.
func (s *Server) concerned(q flow.Query) map[string]bool {
	source, _ := flow.ParseServices(q.Source)           // Filter has seen to it
	destination, _ := flow.ParseServices(q.Destination) // likewise
	nodes := map[string]bool{}
	if source.IsZero() && destination.IsZero() {
		for _, n := range s.Nodes() {
			nodes[n.Name] = true
		}
		return nodes
	}
	snapshot := s.state.Snapshot()
	called := s.feeds.calls(source, destination, nodes)
	for name := range state.Services.All(snapshot) {
		serves := !destination.IsZero() && covers(destination, name) || called[name]
		if serves || destination.IsZero() && covers(source, name) {
			maps.Copy(nodes, nodesOf(snapshot, name))
		}
	}
	return nodes
}

// covers reports whether a pattern of a query covers a service; zero covers all.
func covers(pattern, name catalog.Name) bool {
	return pattern.IsZero() || pattern.Namespace == name.Namespace && (pattern.Name == "*" || pattern.Name == name.Name)
}

// calls adds the nodes that subscribe to a destination for a source, and returns
// the destinations.
func (f *feeds) calls(source, destination catalog.Name, nodes map[string]bool) map[catalog.Name]bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	called := map[catalog.Name]bool{}
	for name, set := range f.endpoints {
		if !covers(destination, name) {
			continue
		}
		for sub := range set.subs {
			if covers(source, sub.source) {
				nodes[sub.stream.caller.node] = true
				called[name] = true
			}
		}
	}
	return called
}

// Watch implements meshpb.MeshServer. It holds no lease and knows no heartbeat: a
// node that can't be asked is as alive as ever.
func (s *Server) Watch(wire watchStream) error {
	c, err := s.authenticate(wire.Context(), acl.Watch)
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(wire.Context())
	defer end(nil)
	w := &watcher{caller: c, work: make(chan struct{}, 1), end: end}
	if older := s.watchers.connect(w); older != nil {
		older.end(s.refuse(codes.Aborted, meshpb.ReasonSuperseded, "node %s has opened a newer stream", c.node))
	}
	defer s.watchers.disconnect(w)
	if err := s.quorate(); err != nil { // since it was authenticated
		return err
	}
	expiry := time.AfterFunc(time.Until(c.until), func() { end(s.expired(c)) })
	defer expiry.Stop()
	go func() { end(s.receiveAnswers(w, wire)) }() // it ends with the stream, that is after this function has returned
	for {
		select {
		case <-w.work:
		case <-ctx.Done():
			if cause := context.Cause(ctx); status.Code(cause) != codes.Unknown {
				return cause //nolint:wrapcheck // a status
			}
			return status.FromContextError(wire.Context().Err()).Err() //nolint:wrapcheck // a status
		case <-s.stop:
			return s.refuse(codes.Unavailable, meshpb.ReasonStopping, "the server is stopping: use another one")
		}
		for _, q := range s.watchers.queued(w) {
			if err := wire.Send(q); err != nil {
				return err //nolint:wrapcheck // gRPC's own
			}
		}
	}
}

func (w *watchers) connect(one *watcher) (older *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	older = w.nodes[one.caller.node]
	w.nodes[one.caller.node] = one
	return older
}

// closeAll ends all streams.
func (w *watchers) closeAll(reason error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, one := range w.nodes {
		one.end(reason)
	}
}

func (w *watchers) disconnect(one *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.nodes[one.caller.node] == one {
		delete(w.nodes, one.caller.node)
	}
	for _, a := range w.asks {
		delete(a.asked, one)
		delete(a.pending, one)
		delete(a.starting, one)
		a.settle()
	}
}

func (w *watchers) queued(one *watcher) []*meshpb.WatchQuery {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := one.queue
	one.queue = nil
	return out
}

// receiveAnswers passes on what the node answers. It never waits for the one who
// asked.
func (s *Server) receiveAnswers(w *watcher, wire watchStream) error {
	for {
		m, err := wire.Recv()
		if err != nil {
			return err //nolint:wrapcheck // gRPC's own
		}
		snapshot := s.state.Snapshot()
		if err := s.admit(snapshot, w.caller); err != nil {
			return err
		}
		a := s.watchers.find(w, m.GetId())
		if a == nil {
			continue // it was taken back
		}
		var piece flow.Answer
		if err := json.Unmarshal(m.GetAnswer(), &piece); err != nil {
			return s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "an answer can't be read: %v", err)
		}
		if refused := s.vet(snapshot, w, a, &piece); refused > 0 && !w.warned {
			w.warned = true
			s.log.Warn("node answers with what is not its own; that is left out", slog.String("node", w.caller.node), slog.Int("records", refused))
		}
		s.watchers.answered(w, a, piece)
	}
}

func (w *watchers) find(one *watcher, id uint64) *ask {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.asks[id]
	if a == nil {
		return nil
	}
	if _, asked := a.pending[one]; !asked {
		return nil
	}
	return a
}

func (w *watchers) answered(one *watcher, a *ask, piece flow.Answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if piece.Error != "" {
		a.problems[one.caller.node] = piece.Error[:min(len(piece.Error), flow.MaxCause)]
	}
	if piece.Caught || piece.Done {
		delete(a.starting, one)
	}
	if piece.Done {
		delete(a.pending, one)
	}
	if a.query.Want == flow.Find && !a.isHere && slices.ContainsFunc(piece.Records, func(r flow.Record) bool { return r.Verdict != flow.Passed }) {
		a.isHere = true
		close(a.found)
	}
	a.box.Put(flow.Answer{Records: piece.Records, Sample: piece.Sample, Dropped: piece.Dropped, Kept: piece.Kept})
	a.settle()
}

// vet leaves of an answer only what was asked for and what the node may tell: what
// its own proxies saw on behalf of services that it may run. It returns how much it
// has left out of the second kind.
func (s *Server) vet(snapshot *state.Snapshot, w *watcher, a *ask, piece *flow.Answer) (refused int) {
	node, ok := state.Nodes.Get(snapshot, w.caller.node)
	verdicts := map[spiffe.ID]bool{}
	mine := func(id spiffe.ID) bool {
		may, known := verdicts[id]
		if !known {
			name := flow.Service(id)
			may = ok && node.Err == nil && id.TrustDomain == s.config.TrustDomain && !name.IsZero() &&
				(node.Value.MayRun(name) || snapshot.Runs(w.caller.node, name))
			verdicts[id] = may
		}
		if !may {
			refused++
		}
		return may
	}
	piece.Records = slices.DeleteFunc(piece.Records, func(r flow.Record) bool {
		if own := r.Own(); own.IsZero() {
			// A stranger on the mesh port, or bytes that were no request.
			if r.Verdict != flow.Refused && r.Verdict != flow.Failed {
				refused++
				return true
			}
		} else if !mine(own) {
			return true
		}
		return a.query.Want == flow.Edges || !a.filter.MatchRecord(&r) || r.Time.Before(a.query.Since)
	})
	for i := range piece.Records {
		piece.Records[i].Bound()
		piece.Records[i].Node = w.caller.node
	}
	if piece.Sample != nil {
		piece.Sample.Node = w.caller.node
		piece.Sample.Edges = slices.DeleteFunc(piece.Sample.Edges, func(e flow.Edge) bool {
			// What is counted together, beyond the pairs that have counters of their
			// own, names nobody.
			own := e.Own()
			return !own.IsZero() && !mine(own) || !a.filter.Between(e.Source, e.Destination)
		})
		if a.query.Want != flow.Edges {
			piece.Sample = nil
		}
	}
	return refused
}
