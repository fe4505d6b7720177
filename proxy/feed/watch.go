package feed

import (
	"context"
	"errors"
	"fmt"

	"github.com/meshd/meshd/proxy/flow"
)

// maxQueries bounds the queries that are put to proxies at a time.
const maxQueries = 64

// ErrQueries is wrapped when too many queries are under way.
var ErrQueries = errors.New("too many queries are under way on this host")

// A Watcher answers queries about what a proxy sees.
type Watcher interface {
	// Watch hands emit the answer, piece by piece, until it is complete, ctx ends or emit fails. emit may block for as long as the
	// agent does not read.
	Watch(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error
}

// Query puts a question to a proxy, or takes it back.
type Query struct {
	ID    uint64     `json:"id"`
	Query flow.Query `json:"query,omitzero"`
	Stop  bool       `json:"stop,omitempty"`
}

// Answer is a piece of the answer to the query of the same ID. The last one is Done.
type Answer struct {
	ID     uint64      `json:"id"`
	Answer flow.Answer `json:"answer"`
}

// asked is a query under way.
type asked struct {
	query   flow.Query
	deliver func(flow.Answer)
	// pending are the sessions that have not answered to the end.
	pending map[*session]struct{}
	// done is closed when there are none, unless the query is for as long as it is asked.
	done   chan struct{}
	closed bool
}

// settle closes done once nobody is left to answer.
func (a *asked) settle() {
	if len(a.pending) == 0 && !a.closed && !a.query.Lasting() {
		a.closed = true
		close(a.done)
	}
}

// Ask puts a query to every process of every proxy that is connected, and if the query has no end, to those that connect later.
// deliver is handed the pieces of their answers as they come; it is called from several goroutines and must not block. Ask
// returns nil when ctx ends, or when all have answered. A proxy too old to be asked is left out. Errors wrap flow.ErrQuery or
// ErrQueries.
func (s *Server) Ask(ctx context.Context, q flow.Query, deliver func(flow.Answer)) error {
	if err := q.Validate(); err != nil {
		return fmt.Errorf("ask proxies: %w", err)
	}
	a := &asked{query: q, deliver: deliver, pending: map[*session]struct{}{}, done: make(chan struct{})}
	s.mu.Lock()
	if len(s.queries) >= maxQueries {
		s.mu.Unlock()
		return fmt.Errorf("ask proxies: %w: at most %d", ErrQueries, maxQueries)
	}
	s.seq++
	id := s.seq
	s.queries[id] = a
	for sess := range s.sessions {
		sess.ask(id, a)
	}
	a.settle()
	s.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-a.done:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.queries, id)
	for sess := range a.pending {
		sess.questions = append(sess.questions, Query{ID: id, Stop: true})
		sess.wake()
	}
	return nil
}

// ask puts a query to one session. Server.mu is held, here and below.
func (s *session) ask(id uint64, a *asked) {
	if !s.watches {
		return
	}
	a.pending[s] = struct{}{}
	s.questions = append(s.questions, Query{ID: id, Query: a.query})
	s.wake()
}

// askLate puts the queries without an end to a session that is new.
func (s *Server) askLate(sess *session) {
	for id, a := range s.queries {
		if a.query.Lasting() {
			sess.ask(id, a)
		}
	}
}

// lost takes note that a session answers nothing any more.
func (s *Server) lost(sess *session) {
	for _, a := range s.queries {
		delete(a.pending, sess)
		a.settle()
	}
}

// answered passes a piece of an answer on.
func (s *Server) answered(sess *session, piece *Answer) {
	s.mu.Lock()
	a := s.queries[piece.ID]
	asked := false
	if a != nil {
		_, asked = a.pending[sess]
	}
	s.mu.Unlock()
	if !asked { // it was taken back
		return
	}
	a.deliver(piece.Answer)
	if !piece.Answer.Done {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(a.pending, sess)
	a.settle()
}

// query starts or ends an answer to the agent. Only the goroutine of Run calls it.
func (c *Client) query(ctx context.Context, q *Query) {
	if stop := c.answering[q.ID]; stop != nil {
		stop()
		delete(c.answering, q.ID)
	}
	if q.Stop {
		return
	}
	if c.cfg.Watcher == nil || len(c.answering) >= maxQueries {
		c.write(ctx, Frame{Answer: &Answer{ID: q.ID, Answer: flow.Answer{Done: true, Error: "this proxy can't answer now"}}}, nil)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	c.answering[q.ID] = cancel
	c.answers.Go(func() {
		defer cancel()
		emit := func(a flow.Answer) error {
			select {
			case c.pieces <- Answer{ID: q.ID, Answer: a}:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		last := flow.Answer{Done: true}
		if err := c.cfg.Watcher.Watch(ctx, q.Query, emit); err != nil {
			last.Error = err.Error()
		}
		_ = emit(last) // it fails if nobody waits for it any more
	})
}

// piece sends a piece of an answer that is still wanted.
func (c *Client) piece(ctx context.Context, a Answer) {
	stop := c.answering[a.ID]
	if stop == nil {
		return
	}
	c.write(ctx, Frame{Answer: &a}, nil)
	if a.Answer.Done {
		delete(c.answering, a.ID)
	}
}

// forgetQueries ends all answers: who asked is gone.
func (c *Client) forgetQueries() {
	for id, stop := range c.answering {
		stop()
		delete(c.answering, id)
	}
}
