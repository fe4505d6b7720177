package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/flow"
)

const (
	// peerPatience is how long the hosts of another server have to answer: its own
	// patience, and the way.
	peerPatience = answerPatience + time.Second
	// peerInterval is how often servers that could not be asked, or are new, are asked
	// a lasting question.
	peerInterval = 2 * time.Second
)

// Asker puts a question to the hosts of one server. It returns when there are no more
// answers, ctx ends, or emit fails.
type Asker struct {
	Server string
	Ask    func(ctx context.Context, emit func(flow.Answer) error) error
}

// Ask is AskLocal for the hosts of all servers. A server that can't be asked is named
// among the silent, and a lasting question reaches it when it can be.
func (s *Server) Ask(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	if len(s.config.peers()) == 0 {
		return s.AskLocal(ctx, q, emit)
	}
	query, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("ask the hosts: %w", err)
	}
	own := Asker{s.config.Server, func(ctx context.Context, emit func(flow.Answer) error) error { return s.AskLocal(ctx, q, emit) }}
	return MergeAnswers(ctx, q, own, func() []Asker {
		var out []Asker
		for _, p := range s.config.peers() {
			out = append(out, Asker{p.Name, func(ctx context.Context, emit func(flow.Answer) error) error {
				return p.Ask(ctx, query, func(answer []byte) error {
					var piece flow.Answer
					if err := json.Unmarshal(answer, &piece); err != nil {
						return fmt.Errorf("an answer can't be read: %w", err)
					}
					return emit(piece)
				})
			}})
		}
		return out
	}, emit)
}

// ServeAsk answers another server's Ask with what the hosts of this one say.
func (s *Server) ServeAsk(ctx context.Context, query []byte, emit func(answer []byte) error) error {
	var q flow.Query
	if err := json.Unmarshal(query, &q); err != nil {
		return fmt.Errorf("%w: what another server asks can't be read: %w", flow.ErrQuery, err)
	}
	return s.AskLocal(ctx, q, func(a flow.Answer) error {
		for _, piece := range a.Pieces() {
			raw, err := json.Marshal(piece)
			if err != nil {
				return fmt.Errorf("encode an answer: %w", err)
			}
			if err := emit(raw); err != nil {
				return err
			}
		}
		return nil
	})
}

// merger brings the answers of several servers together.
type merger struct {
	box *flow.Mailbox
	q   flow.Query

	mu    sync.Mutex
	parts map[string]*part
	// here says that some host has what is looked for: the others are hardly missed.
	here  bool
	found func()
}

// part is what one server has said.
type part struct {
	running bool
	told    bool // hosts and silent are known
	hosts   int
	silent  []string
	problem string
}

// MergeAnswers asks own and others, and hands emit one answer made of theirs, as
// AskLocal does with those of hosts. It fails as own does; what fails elsewhere is told
// in the answer. others is asked again for who is there while a question lasts.
func MergeAnswers(ctx context.Context, q flow.Query, own Asker, others func() []Asker, emit func(flow.Answer) error) error {
	if _, err := q.Filter(); err != nil {
		return fmt.Errorf("ask the hosts: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	away, stop := context.WithCancel(ctx) // of the other servers
	defer stop()
	patience := time.AfterFunc(time.Hour, stop)
	defer patience.Stop()
	m := &merger{box: flow.NewMailbox(q), q: q, parts: map[string]*part{}}
	m.found = sync.OnceFunc(func() { patience.Reset(foundPatience) })
	if !q.Lasting() {
		patience.Reset(peerPatience)
	}

	var group sync.WaitGroup
	m.begin(own.Server)
	group.Go(func() {
		err := own.Ask(ctx, m.receive(own.Server))
		if err != nil {
			cancel(err)
		}
		m.end(own.Server, err)
	})
	ask := func() {
		for _, o := range others() {
			if m.begin(o.Server) {
				group.Go(func() { m.end(o.Server, o.Ask(away, m.receive(o.Server))) })
			}
		}
	}
	ask()
	if q.Lasting() {
		group.Go(func() { m.keepAsking(ctx, ask) })
	}
	ended := make(chan struct{})
	go func() { group.Wait(); close(ended) }()
	err := m.box.Drain(ctx, ended, emit)
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(nil)
	<-ended
	return err
}

// keepAsking asks the servers that do not answer yet, until ctx ends. Those that have
// said nothing after a while are told to be silent.
func (m *merger) keepAsking(ctx context.Context, ask func()) {
	late := time.NewTimer(peerPatience)
	defer late.Stop()
	again := time.NewTicker(peerInterval)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-late.C:
			m.giveUp()
		case <-again.C:
			ask()
		}
	}
}

// giveUp no longer waits for the servers that have said nothing.
func (m *merger) giveUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	news := false
	for _, p := range m.parts {
		if !p.told {
			p.told, p.problem, news = true, "did not answer", true
		}
	}
	if news {
		m.tell()
	}
}

// begin reports whether a server is to be asked now.
func (m *merger) begin(server string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.parts[server]
	if p == nil {
		p = &part{}
		m.parts[server] = p
	}
	if p.running {
		return false
	}
	p.running = true
	return true
}

func (m *merger) receive(server string) func(flow.Answer) error {
	return func(a flow.Answer) error {
		m.mu.Lock()
		if a.Caught {
			p := m.parts[server]
			p.told, p.hosts, p.silent, p.problem = true, a.Hosts, a.Silent, ""
			m.tell()
		}
		if m.q.Want == flow.Find && slices.ContainsFunc(a.Records, func(r flow.Record) bool { return r.Verdict != flow.Passed }) {
			m.here = true
			m.found()
		}
		m.mu.Unlock()
		a.Caught, a.Hosts, a.Silent = false, 0, nil
		m.box.Put(a)
		return nil
	}
}

// end notes that a server answers no more.
func (m *merger) end(server string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.parts[server]
	p.running = false
	switch {
	case err == nil && (p.told || m.q.Lasting()):
		return // it said all, or the question was taken back
	case p.told && p.problem != "":
		return // it was told already, and is asked again
	case m.here:
		p.told = true
		m.tell()
		return
	}
	p.told, p.hosts, p.silent, p.problem = true, 0, nil, "could not be asked"
	if err == nil || errors.Is(err, context.Canceled) {
		p.problem = "did not answer"
	}
	m.tell()
}

// tell puts what all servers together say of their hosts, once all have said it. mu is
// held.
func (m *merger) tell() {
	all := flow.Answer{Caught: true}
	for _, p := range m.parts {
		if !p.told {
			return
		}
		all.Hosts += p.hosts
		all.Silent = append(all.Silent, p.silent...)
	}
	for server, p := range m.parts {
		if p.problem != "" {
			all.Silent = append(all.Silent, "server "+server+": "+p.problem)
		}
	}
	slices.Sort(all.Silent)
	m.box.Put(all)
}
