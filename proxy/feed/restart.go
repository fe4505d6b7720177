package feed

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

var (
	// ErrNoProxy is wrapped when no active process of a proxy is connected.
	ErrNoProxy = errors.New("no active process of this proxy is attached")
	// ErrNoRestart is wrapped when a process can't start its successor: it is of an older version.
	ErrNoRestart = errors.New("this mesh-proxy is too old to hand over to another: restart its unit instead")
	// ErrRestart is wrapped when no other process took over. The one before serves on.
	ErrRestart = errors.New("mesh-proxy was not replaced, and serves on")
)

// restarting is a Restart that is under way.
type restarting struct {
	sess *session
	done chan Restarted // has room for one
}

// Restart has the active process of a proxy start its program anew and hand over to it, and returns the PID of the one that serves
// now. It blocks until that is so, or an error that wraps one of the above; the end of ctx ends the waiting only.
func (s *Server) Restart(ctx context.Context, proxyID string) (pid int, err error) {
	r, err := s.wish(proxyID)
	if err != nil {
		return 0, fmt.Errorf("restart proxy %s: %w", proxyID, err)
	}
	select {
	case answer := <-r.done:
		if answer.Error != "" {
			return 0, fmt.Errorf("restart proxy %s: %w: %s", proxyID, ErrRestart, answer.Error)
		}
		s.awaitActive(ctx, proxyID, answer.PID)
		return answer.PID, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("restart proxy %s: it has not answered yet, and may still restart: %w", proxyID, ctx.Err())
	}
}

// activeTimeout is how long a process that serves may take to say so here.
const activeTimeout = time.Second

// awaitActive returns once Status shows that a process serves.
func (s *Server) awaitActive(ctx context.Context, proxyID string, pid int) {
	ctx, cancel := context.WithTimeout(ctx, activeTimeout)
	defer cancel()
	for {
		changed := s.Changed()
		if slices.ContainsFunc(s.Status(), func(p ProxyStatus) bool { return p.Proxy == proxyID && p.PID == pid && p.State == Active }) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// wish asks the newest active process.
func (s *Server) wish(proxyID string) (*restarting, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var chosen *session
	for sess := range s.sessions {
		st := &sess.status
		if st.Proxy == proxyID && st.State == Active && (chosen == nil || st.Since.After(chosen.status.Since)) {
			chosen = sess
		}
	}
	switch {
	case chosen == nil:
		return nil, ErrNoProxy
	case !chosen.restarts:
		return nil, ErrNoRestart
	}
	s.seq++
	r := &restarting{sess: chosen, done: make(chan Restarted, 1)}
	s.restarts[s.seq] = r
	chosen.wishes = append(chosen.wishes, Restart{ID: s.seq})
	chosen.wake()
	return r, nil
}

// restarted passes an answer on.
func (s *Server) restarted(sess *session, answer *Restarted) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.restarts[answer.ID]; r != nil && r.sess == sess {
		delete(s.restarts, answer.ID)
		r.done <- *answer
	}
}

// lostRestart answers for a process that is gone. s.mu is held.
func (s *Server) lostRestart(sess *session) {
	for id, r := range s.restarts {
		if r.sess == sess {
			delete(s.restarts, id)
			r.done <- Restarted{ID: id, Error: "it ended meanwhile"}
		}
	}
}
