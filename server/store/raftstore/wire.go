package raftstore

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// errAnother says that the server at an address is not the member that was meant:
// its state was wiped, or another one took its address. What it answers must not
// count as a vote or an acknowledgement of the member.
var errAnother = errors.New("another member answers at this address")

// wire is the Transport as Raft sees it. It
//   - is silent while this server's disk hangs: Raft's heartbeats come from
//     goroutines of their own, and would keep a leader in office that can't write;
//   - takes answers only from the member that was asked;
//   - remembers when each member answered last, and how long its log was;
//   - lets a leader's word of what is committed reach only as far as the entries
//     that it has compared (see known), and arrive before new entries are written
//     (see first);
//   - can hand this member a request of its own (see nominate).
type wire struct {
	raft.Transport

	silent func() error // not nil while nothing may be sent
	rpcs   chan raft.RPC
	done   chan struct{}
	told   uint64 // how far first has gone; of relay

	mu    sync.Mutex
	heard map[string]heard // by ID
}

// heard is the newest answer of a member.
type heard struct {
	at   time.Time
	last uint64 // index of its last log entry
}

// newWire wraps inner until close.
func newWire(inner raft.Transport, silent func() error) *wire {
	w := &wire{
		Transport: inner, silent: silent,
		rpcs: make(chan raft.RPC), done: make(chan struct{}), heard: map[string]heard{},
	}
	go w.relay()
	return w
}

func (w *wire) relay() {
	in := w.Transport.Consumer()
	for {
		select {
		case rpc := <-in:
			rpc = known(rpc)
			if before, ok := w.first(rpc); ok && !w.hand(before) || !w.hand(rpc) {
				return
			}
		case <-w.done:
			return
		}
	}
}

// known bounds the index up to which a follower may take its log for committed by
// the last entry that the request has compared with the leader's or brings. Raft
// (v1.8.0) bounds it by the end of the follower's own log, which may be longer: a
// leader whose first write takes a while announces what it has committed since in
// a request without entries, and a former leader would apply its own entries of
// that index, which nobody else has.
func known(rpc raft.RPC) raft.RPC {
	a, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if !ok {
		return rpc
	}
	if last := a.PrevLogEntry + uint64(len(a.Entries)); a.LeaderCommitIndex > last {
		bounded := *a // the sender may still read its own
		bounded.LeaderCommitIndex = last
		rpc.Command = &bounded
	}
	return rpc
}

// hand gives a request to Raft. It reports false when the wrapper is closed.
func (w *wire) hand(rpc raft.RPC) bool {
	select {
	case w.rpcs <- rpc:
		return true
	case <-w.done:
		return false
	}
}

// first returns what a request with entries says of those before them, as a
// request of its own. Raft writes and syncs the new entries before it applies the
// old ones, so that under load everything that waits for a follower's state would
// wait for the next write too.
func (w *wire) first(rpc raft.RPC) (raft.RPC, bool) {
	a, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if !ok || len(a.Entries) == 0 {
		return raft.RPC{}, false
	}
	committed := min(a.LeaderCommitIndex, a.PrevLogEntry)
	if committed <= w.told {
		return raft.RPC{}, false
	}
	w.told = committed
	before := *a
	before.Entries, before.LeaderCommitIndex = nil, committed
	return raft.RPC{Command: &before, RespChan: make(chan raft.RPCResponse, 1)}, true
}

// close ends the wrapper and closes what it wraps, if that can be closed.
func (w *wire) close() error {
	close(w.done)
	if c, ok := w.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}

// Consumer implements raft.Transport.
func (w *wire) Consumer() <-chan raft.RPC { return w.rpcs }

// Close implements raft.WithClose. Raft calls it when it shuts down; the engine
// closes the wire after that, by close.
func (w *wire) Close() error { return nil }

// standNow makes the Raft that reads from w stand for election at once. Nobody
// but Raft's main loop answers, so it is bounded by within.
func (w *wire) standNow(header raft.RPCHeader, within time.Duration) error {
	reply := make(chan raft.RPCResponse, 1)
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case w.rpcs <- raft.RPC{Command: &raft.TimeoutNowRequest{RPCHeader: header}, RespChan: reply}:
	case <-timer.C:
		return fmt.Errorf("raft did not take the request within %v", within)
	}
	select {
	case got := <-reply:
		return got.Error
	case <-timer.C:
		return fmt.Errorf("raft did not answer within %v", within)
	}
}

// meant checks that id itself has answered, and remembers it.
func (w *wire) meant(id raft.ServerID, by raft.RPCHeader, last uint64) error {
	if len(by.ID) > 0 && string(by.ID) != string(id) {
		return fmt.Errorf("%w: %q instead of %q", errAnother, by.ID, id)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard[string(id)] = heard{at: time.Now(), last: max(last, w.heard[string(id)].last)}
	return nil
}

// of returns the newest answer of a member; the zero value if it never answered.
func (w *wire) of(id string) heard {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard[id]
}

// AppendEntries implements raft.Transport.
func (w *wire) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := w.silent(); err != nil {
		return err
	}
	if err := w.Transport.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	return w.meant(id, resp.RPCHeader, appended(args, resp))
}

// appended returns where the log of a follower ends after its answer.
func appended(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) uint64 {
	if n := len(args.Entries); resp.Success && n > 0 {
		return max(resp.LastLog, args.Entries[n-1].Index)
	}
	return resp.LastLog
}

// RequestVote implements raft.Transport.
func (w *wire) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := w.silent(); err != nil {
		return err
	}
	if err := w.Transport.RequestVote(id, target, args, resp); err != nil {
		return err
	}
	return w.meant(id, resp.RPCHeader, 0)
}

// RequestPreVote implements raft.WithPreVote.
func (w *wire) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if err := w.silent(); err != nil {
		return err
	}
	inner, ok := w.Transport.(raft.WithPreVote)
	if !ok {
		return fmt.Errorf("the transport %T can't ask for pre-votes", w.Transport)
	}
	if err := inner.RequestPreVote(id, target, args, resp); err != nil {
		return err
	}
	return w.meant(id, resp.RPCHeader, 0)
}

// InstallSnapshot implements raft.Transport.
func (w *wire) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := w.silent(); err != nil {
		return err
	}
	return w.Transport.InstallSnapshot(id, target, args, resp, data)
}

// AppendEntriesPipeline implements raft.Transport.
func (w *wire) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	if err := w.silent(); err != nil {
		return nil, err
	}
	inner, err := w.Transport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	p := &pipeline{AppendPipeline: inner, wire: w, id: id, answers: make(chan raft.AppendFuture, 1), done: make(chan struct{})}
	go p.relay()
	return p, nil
}

// pipeline checks the answers of a pipeline as wire does.
type pipeline struct {
	raft.AppendPipeline

	wire    *wire
	id      raft.ServerID
	answers chan raft.AppendFuture
	once    sync.Once
	done    chan struct{}
}

func (p *pipeline) relay() {
	in := p.AppendPipeline.Consumer()
	for {
		select {
		case f := <-in:
			if err := p.wire.meant(p.id, f.Response().RPCHeader, appended(f.Request(), f.Response())); err != nil {
				f.Response().Success = false // Raft gives the pipeline up
			}
			select {
			case p.answers <- f:
			case <-p.done:
				return
			}
		case <-p.done:
			return
		}
	}
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.answers }

// AppendEntries implements raft.AppendPipeline.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if err := p.wire.silent(); err != nil {
		return nil, err
	}
	return p.AppendPipeline.AppendEntries(args, resp)
}

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() { close(p.done) })
	return p.AppendPipeline.Close()
}
