package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/meshpb"
)

const (
	// watchRetry is the wait, with jitter, before the second stream is opened again.
	watchRetry = 2 * time.Second
	// watchPatience is how long the proxies of a host have to answer a question that
	// has an end.
	watchPatience = 2 * time.Second
)

// watch answers a query from what the proxies of this host see. It blocks until the
// answer is complete, ctx ends, or emit fails. However slow emit is, no proxy waits.
func (h *host) watch(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	if err := q.Validate(); err != nil {
		return err
	}
	asking, cancel := context.WithCancel(ctx)
	defer cancel()
	if !q.Lasting() {
		asking, cancel = context.WithTimeout(asking, watchPatience)
		defer cancel()
	}
	box := flow.NewMailbox(q)
	if q.Lasting() && len(h.feed.Status()) == 0 { // it has begun, although there is nothing to see yet
		box.Put(flow.Answer{Caught: true})
	}
	ended := make(chan struct{})
	var asked error
	var problem atomic.Pointer[string]
	go func() {
		defer close(ended)
		asked = h.feed.Ask(asking, q, func(a flow.Answer) {
			if a.Error != "" {
				problem.Store(&a.Error)
			}
			if a.Sample != nil {
				a.Sample.Node = h.cfg.NodeName
			}
			for i := range a.Records {
				a.Records[i].Node = h.cfg.NodeName
			}
			box.Put(a)
		})
	}()
	err := box.Drain(ctx, ended, func(a flow.Answer) error {
		for _, piece := range a.Pieces() {
			if err := emit(piece); err != nil {
				return err
			}
		}
		return nil
	})
	if late := errors.Is(asking.Err(), context.DeadlineExceeded); late && ctx.Err() == nil {
		err = errors.Join(err, errProxyLate)
	}
	cancel()
	<-ended
	if text := problem.Load(); text != nil && ctx.Err() == nil {
		err = errors.Join(err, errors.New(*text))
	}
	return errors.Join(err, asked)
}

var errProxyLate = errors.New("a proxy did not answer in time")

// followQueries answers what the servers ask, over a stream of its own beside that
// of the view, until ctx ends.
func (h *host) followQueries(ctx context.Context) error {
	for ctx.Err() == nil {
		client, changed := h.link()
		if client == nil {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		err := h.answerQueries(ctx, client)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // told to end
		}
		h.log.DebugContext(ctx, "the stream of queries ended", slog.Any("error", err))
		wait := time.NewTimer(watchRetry/2 + rand.N(watchRetry)) //nolint:gosec // jitter
		retry := wait.C
		if status.Code(err) == codes.Unimplemented {
			retry = nil // an older server: another one may know it
		}
		select {
		case <-retry:
		case <-changed:
		case <-ctx.Done():
		}
		wait.Stop()
	}
	return nil
}

// querySession is one stream of queries.
type querySession struct {
	host *host
	wire grpc.BidiStreamingClient[meshpb.WatchAnswer, meshpb.WatchQuery]
	send sync.Mutex // one answer at a time

	mu      sync.Mutex
	running map[uint64]context.CancelFunc
	tasks   sync.WaitGroup
}

// maxServerQueries bounds what the servers ask a host at a time.
const maxServerQueries = 32

// answerQueries holds one stream until it breaks or ctx ends.
func (h *host) answerQueries(ctx context.Context, client meshpb.MeshClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wire, err := client.Watch(ctx)
	if err != nil {
		return err
	}
	s := &querySession{host: h, wire: wire, running: map[uint64]context.CancelFunc{}}
	defer s.tasks.Wait()
	defer cancel()
	for {
		m, err := wire.Recv()
		if err != nil {
			return err
		}
		s.take(ctx, m)
	}
}

// take starts to answer a query, or stops.
func (s *querySession) take(ctx context.Context, m *meshpb.WatchQuery) {
	id := m.GetId()
	s.mu.Lock()
	defer s.mu.Unlock()
	if stop := s.running[id]; stop != nil {
		stop()
		return
	}
	if len(m.GetQuery()) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	crowded := len(s.running) >= maxServerQueries
	s.running[id] = cancel
	s.tasks.Go(func() {
		last := flow.Answer{Done: true}
		if err := s.run(ctx, id, m.GetQuery(), crowded); err != nil {
			last.Error = err.Error()
		}
		_ = s.answer(id, last) // it fails if the stream is gone, and with it who asked
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.running, id)
	})
}

var errCrowded = errors.New("this host is asked too much at a time")

// run answers one query.
func (s *querySession) run(ctx context.Context, id uint64, query []byte, crowded bool) error {
	if crowded {
		return errCrowded
	}
	var q flow.Query
	if err := json.Unmarshal(query, &q); err != nil {
		return fmt.Errorf("the query can't be read: %w", err)
	}
	return s.host.watch(ctx, q, func(a flow.Answer) error { return s.answer(id, a) })
}

// answer sends a piece. It waits for the server to read, which holds up nothing
// but answers.
func (s *querySession) answer(id uint64, a flow.Answer) error {
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	s.send.Lock()
	defer s.send.Unlock()
	return s.wire.Send(&meshpb.WatchAnswer{Id: id, Answer: data})
}
