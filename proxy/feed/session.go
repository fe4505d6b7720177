package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy"
)

// session is one connected proxy process. Its fields below conn are guarded by Server.mu.
type session struct {
	conn *conn
	// dirty has room for one: there may be something to send.
	dirty chan struct{}

	status      ProxyStatus
	stateWanted State
	// parts are the hashes of what the process has; next are those that it will have if it takes the plan under way.
	parts, next map[string]string
	// underWay is the Seq of the plan that is not answered yet, 0 if none is; settled that of the last one that was.
	underWay, settled uint64
	// rest are frames of the plan under way that are not sent yet.
	rest    []Frame
	keys    map[spiffe.ID]string
	sockets map[string]uint64 // name to cookie
	// watches says that the process answers queries; questions are those that it was not sent yet.
	watches   bool
	questions []Query
	// restarts says that the process can start its successor; wishes are to be sent.
	restarts bool
	wishes   []Restart
}

func (s *session) wake() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// serve runs one session to its end and logs how it ended.
func (s *Server) serve(ctx context.Context, uc *net.UnixConn) {
	c := newConn(uc)
	defer c.close()
	sess, err := s.admit(c)
	if err != nil {
		s.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "proxy was not admitted to the feed", slog.Any("error", err))
		return
	}
	log := s.cfg.Log.With(slog.String("proxy", sess.status.Proxy), slog.String("session", sess.status.Session))
	log.LogAttrs(ctx, slog.LevelInfo, "proxy attached", slog.Int("pid", sess.status.PID), slog.String("version", sess.status.Version))
	defer s.forget(sess)

	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = uc.Close() })
	defer stop()
	g.Go(func() error { return s.receive(sess) })
	g.Go(func() error { return s.send(ctx, sess) })
	err = g.Wait()
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if err != nil {
		log.LogAttrs(ctx, slog.LevelWarn, "proxy was lost", slog.Any("error", err))
		return
	}
	log.LogAttrs(ctx, slog.LevelInfo, "proxy detached")
}

// admit checks who connected and reads its Hello.
func (s *Server) admit(c *conn) (*session, error) {
	uid, err := c.peerUID()
	if err != nil {
		return nil, err
	}
	if uid != 0 && int(uid) != os.Getuid() && (s.cfg.AllowUID == nil || !s.cfg.AllowUID(uid)) {
		return nil, fmt.Errorf("%w: user %d", ErrPeer, uid)
	}
	if err := c.uc.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return nil, fmt.Errorf("wait for a proxy's hello: %w", err)
	}
	f, files, err := c.read()
	if err != nil {
		return nil, fmt.Errorf("wait for a proxy's hello: %w", err)
	}
	closeFiles(files)
	h := f.Hello
	if h == nil || h.Proxy == "" || h.Session == "" {
		return nil, fmt.Errorf("%w: a session starts with a hello that names proxy and session", ErrFrame)
	}
	if err := c.uc.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("admit proxy %s: %w", h.Proxy, err)
	}
	sess := &session{
		conn: c, dirty: make(chan struct{}, 1), stateWanted: h.State,
		parts: maps.Clone(h.Parts), keys: map[spiffe.ID]string{}, sockets: map[string]uint64{},
		status: ProxyStatus{
			Proxy: h.Proxy, Session: h.Session, PID: h.PID, UID: uid, Version: h.Version, FeatureLevel: h.FeatureLevel,
			State: h.State, Since: time.Now(), Applied: h.Applied,
		},
		watches: h.Watches, restarts: h.Restarts,
	}
	for text, hash := range h.Keys {
		if id, err := spiffe.Parse(text); err == nil {
			sess.keys[id] = hash
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sessions) >= maxSessions {
		return nil, fmt.Errorf("%w: %d are connected already", ErrPeer, maxSessions)
	}
	s.sessions[sess] = struct{}{}
	s.askLate(sess)
	sess.wake()
	s.announce()
	return sess, nil
}

func (s *Server) forget(sess *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, sess)
	s.lost(sess)
	s.lostRestart(sess)
	s.announce()
}

// receive reads what the proxy reports, until the session ends. It returns io.EOF after a Bye.
func (s *Server) receive(sess *session) error {
	for {
		f, files, err := sess.conn.read()
		if err != nil {
			return err
		}
		switch {
		case f.Applied != nil:
			s.applied(sess, f.Applied)
		case f.Sockets != nil:
			s.offered(sess, f.Sockets, files)
		case f.State != nil:
			s.reported(sess, f.State)
		case f.Answer != nil:
			s.answered(sess, f.Answer)
		case f.Restarted != nil:
			s.restarted(sess, f.Restarted)
		case f.Bye != nil:
			return io.EOF
		default:
			return fmt.Errorf("%w: a proxy does not send this kind", ErrFrame)
		}
	}
}

// reported takes note of a state that the process chose itself.
func (s *Server) reported(sess *session, state *SetTo) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &sess.status
	if st.State != state.To {
		s.cfg.Log.Info("proxy changed its state", slog.String("proxy", st.Proxy), slog.String("session", st.Session), slog.Int("pid", st.PID),
			slog.String("state", string(state.To)), slog.Int("open", state.Open))
	}
	st.State, sess.stateWanted, st.Until = state.To, state.To, state.Until
	if state.To == Draining {
		st.Open = state.Open
	}
	s.announce()
}

func (s *Server) applied(sess *session, a *Applied) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &sess.status
	st.Applied, st.Open = a.Position, a.Open
	st.Closed += a.Closed
	if a.Seq != 0 && a.Seq == sess.underWay {
		if a.Refused == "" {
			sess.parts = sess.next
			st.Refused, st.RefusedPosition = "", a.RefusedPosition
		}
		sess.underWay, sess.settled, sess.next = 0, a.Seq, nil
		sess.wake()
	}
	if a.Refused != "" {
		st.Refused, st.RefusedPosition = a.Refused, a.RefusedPosition
	}
	s.announce()
}

// offered keeps sockets that the proxy opened itself, so that they outlive it.
func (s *Server) offered(sess *session, o *Sockets, files []*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.want(sess.status.Proxy)
	for i, name := range o.Names {
		cookie, err := socketCookie(files[i])
		if _, passed := w.passed[name]; err != nil || passed || len(w.offered) >= maxOffered {
			_ = files[i].Close()
			continue
		}
		if held, ok := w.offered[name]; ok {
			_ = held.file.Close()
		}
		w.offered[name] = heldSocket{file: files[i], cookie: cookie}
		sess.sockets[name] = cookie
	}
	for _, name := range o.Close {
		if held, ok := w.offered[name]; ok {
			_ = held.file.Close()
			delete(w.offered, name)
		}
		delete(sess.sockets, name)
	}
	sess.wake()
	s.announce()
}

// maxOffered bounds the sockets that are kept for one proxy.
const maxOffered = 4096

// send writes what the process lacks, until ctx ends or writing fails.
func (s *Server) send(ctx context.Context, sess *session) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sess.dirty:
		}
		for {
			f, files, err := s.lacking(sess)
			if err != nil {
				return err
			}
			if f == (Frame{}) {
				break
			}
			err = sess.conn.write(f, files)
			closeFiles(files)
			if err != nil {
				return err
			}
		}
	}
}

// lacking returns the next frame for the process and the descriptors that go with it, which the caller owns; the zero Frame
// when it has everything, or has to answer first. The order matters: identities and sockets are there before the plan that
// uses them, and are taken away only after the plan that no longer does was taken.
func (s *Server) lacking(sess *session) (Frame, []*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(sess.rest) > 0 {
		f := sess.rest[0]
		sess.rest = sess.rest[1:]
		return f, nil, nil
	}
	if len(sess.questions) > 0 {
		q := sess.questions[0]
		sess.questions = sess.questions[1:]
		return Frame{Query: &q}, nil, nil
	}
	if len(sess.wishes) > 0 {
		r := sess.wishes[0]
		sess.wishes = sess.wishes[1:]
		return Frame{Restart: &r}, nil, nil
	}
	w := s.want(sess.status.Proxy)
	if sess.stateWanted != sess.status.State {
		sess.status.State = sess.stateWanted
		s.announce()
		return Frame{State: &SetTo{To: sess.stateWanted}}, nil, nil
	}
	if put := w.lackingKeys(sess); len(put) > 0 {
		return Frame{Keys: &Keys{Put: put}}, nil, nil
	}
	if names, files, err := w.lackingSockets(sess); err != nil || len(names) > 0 {
		return Frame{Sockets: &Sockets{Names: names}}, files, err
	}
	if w.planSeq == 0 || sess.underWay != 0 {
		return Frame{}, nil, nil
	}
	if w.planSeq != sess.settled {
		return s.startPlan(sess, w), nil, nil
	}
	if sess.status.Refused != "" {
		return Frame{}, nil, nil // the plan in force still uses what would be dropped
	}
	return w.surplus(sess), nil, nil
}

// startPlan makes the frames of the newest plan, and returns the first.
func (s *Server) startPlan(sess *session, w *wanted) Frame {
	put, drop := proxy.DiffHashes(sess.parts, w.parts)
	sess.underWay = w.planSeq
	sess.next = make(map[string]string, len(w.parts))
	for _, p := range w.parts {
		sess.next[p.Key()] = p.Hash
	}
	var frames []Frame
	size := 0
	plan := &Plan{Seq: w.planSeq, Position: w.position, Drop: drop}
	for _, p := range put {
		if n := len(p.JSON); size > 0 && size+n > maxPayload {
			plan.More = true
			frames = append(frames, Frame{Plan: plan})
			plan, size = &Plan{Seq: w.planSeq, Position: w.position}, 0
		}
		plan.Put = append(plan.Put, p)
		size += len(p.JSON)
	}
	frames = append(frames, Frame{Plan: plan})
	sess.rest = frames[1:]
	return frames[0]
}

func (w *wanted) lackingKeys(sess *session) []Key {
	var put []Key
	size := 0
	for id, held := range w.keys {
		if sess.keys[id] == held.hash {
			continue
		}
		for _, der := range held.key.Chain {
			size += len(der)
		}
		if size > maxPayload && len(put) > 0 {
			break
		}
		sess.keys[id] = held.hash
		put = append(put, held.key)
	}
	return put
}

func (w *wanted) lackingSockets(sess *session) (names []string, files []*os.File, err error) {
	for _, name := range slices.Sorted(maps.Keys(w.passed)) {
		held := w.passed[name]
		if sess.sockets[name] == held.cookie {
			continue
		}
		dup, err := dupFile(held.file)
		if err != nil {
			closeFiles(files)
			return nil, nil, err
		}
		sess.sockets[name] = held.cookie
		names, files = append(names, name), append(files, dup)
		if len(names) == maxDescriptors {
			break
		}
	}
	return names, files, nil
}

// surplus returns the frame that takes away what the plan in force does not need, or the zero Frame.
func (w *wanted) surplus(sess *session) Frame {
	var ids []spiffe.ID
	for id := range sess.keys {
		if _, ok := w.keys[id]; !ok && w.keysSet {
			ids = append(ids, id)
			delete(sess.keys, id)
		}
	}
	if len(ids) > 0 {
		return Frame{Keys: &Keys{Drop: ids}}
	}
	var names []string
	for name := range sess.sockets {
		_, passed := w.passed[name]
		_, offered := w.offered[name]
		if !passed && !offered {
			names = append(names, name)
			delete(sess.sockets, name)
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		return Frame{Sockets: &Sockets{Close: names}}
	}
	return Frame{}
}
