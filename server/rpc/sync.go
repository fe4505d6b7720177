package rpc

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

type syncStream = grpc.BidiStreamingServer[meshpb.SyncRequest, meshpb.SyncResponse]

// Sync implements meshpb.MeshServer. One goroutine receives, the handler's own
// sends, so that an agent that does not read still shows that it lives. Ending
// the stream, cleanly or not, ends nothing else: the node's lease runs on.
func (s *Server) Sync(wire syncStream) error {
	ctx := wire.Context()
	c, err := s.authenticate(ctx, acl.Sync)
	if err != nil {
		return err
	}
	// It ends with the stream, that is after this function has returned.
	received := make(chan *meshpb.SyncRequest)
	failed := make(chan error, 1)
	go func() {
		for {
			m, err := wire.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case received <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	hello, err := s.awaitHello(received, failed)
	if err != nil {
		return err
	}
	leave, ok := s.admission.enter(ctx)
	if !ok {
		return s.refuse(codes.ResourceExhausted, meshpb.ReasonTooMany, "too many agents connect at once: use another server, or try again in a moment")
	}
	defer leave()
	st := newStream(c, hello)
	st.admitted = func(r state.Reader) error { return s.admit(r, c) }
	granted, err := s.leases.connect(ctx, st.admitted, c.node, hello)
	if err != nil {
		return s.storeError(err, "record the lease of node "+c.node)
	}
	st.grant(granted)
	if older := s.fleet.connect(st); older != nil {
		older.end(s.refuse(codes.Aborted, meshpb.ReasonSuperseded, "node %s has opened a newer stream", c.node))
		if older.hello.GetSession() != hello.GetSession() {
			s.log.Warn("node has a second agent, or was restarted in a hurry: the older stream is closed",
				slog.String("node", c.node), slog.String("session", hello.GetSession()), slog.String("older", older.hello.GetSession()))
		}
	}
	defer s.fleet.disconnect(st)
	// Whatever was decided before the stream could be found is seen here.
	if err := s.quorate(); err != nil {
		return err
	}
	if s.review(st, s.state.Snapshot()) {
		s.claim(ctx, st)
	}
	s.feeds.open(st)
	defer s.feeds.close(st)
	st.markAll() // what changed while the stream was being opened
	welcome := &meshpb.Welcome{Server: s.config.Server, HeartbeatMs: s.config.Heartbeat.Milliseconds(), LeaseMs: s.config.Lease.Milliseconds()}
	if err := wire.Send(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Welcome{Welcome: welcome}}); err != nil {
		return err //nolint:wrapcheck // gRPC's own
	}
	go s.receive(st, received, failed)
	return s.send(st, wire, leave)
}

func (s *Server) awaitHello(received <-chan *meshpb.SyncRequest, failed <-chan error) (*meshpb.Hello, error) {
	timer := time.NewTimer(s.config.Lease)
	defer timer.Stop()
	select {
	case m := <-received:
		if hello := m.GetHello(); hello != nil {
			return hello, nil
		}
		return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "the first message of a stream must be Hello")
	case err := <-failed:
		if errors.Is(err, io.EOF) {
			return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "the stream ended before Hello")
		}
		return nil, err
	case <-timer.C:
		return nil, s.refuse(codes.DeadlineExceeded, meshpb.ReasonSilent, "no Hello within %s", s.config.Lease)
	case <-s.stop:
		return nil, s.refuse(codes.Unavailable, meshpb.ReasonStopping, "the server is stopping: use another one")
	}
}

// receive handles what the agent says until the stream ends.
func (s *Server) receive(st *stream, received <-chan *meshpb.SyncRequest, failed <-chan error) {
	for {
		select {
		case <-st.done:
			return
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				err = nil
			}
			st.end(err)
			return
		case m := <-received:
			s.leases.beat(st.caller.node)
			if err := s.handle(st, m); err != nil {
				st.end(err)
				return
			}
		}
	}
}

func (s *Server) handle(st *stream, m *meshpb.SyncRequest) error {
	switch m := m.GetMessage().(type) {
	case *meshpb.SyncRequest_Heartbeat:
		if err := s.expired(st.caller); err != nil {
			return err
		}
		st.heartbeat()
	case *meshpb.SyncRequest_Subscribe:
		if n := len(m.Subscribe.GetTopics()); n > maxTopics {
			return s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "%d topics, at most %d", n, maxTopics)
		}
		if err := s.feeds.subscribe(st, m.Subscribe.GetTopics()); err != nil {
			return s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "%v", err)
		}
		st.subscribed()
	case *meshpb.SyncRequest_Applied:
		if !s.fleet.applied(st.caller.node, m.Applied) {
			s.log.Warn("node reports too many proxies; the rest are not counted", slog.String("node", st.caller.node))
		}
	case *meshpb.SyncRequest_Hello:
		return s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "Hello comes once per stream")
	default: // of a newer agent
	}
	return nil
}

// send writes batches and answers to heartbeats, each batch at the newest state:
// what happens while a Send blocks is in the next one.
// synced is called when the agent has what it has asked for first.
func (s *Server) send(st *stream, wire syncStream, synced func()) error {
	for {
		select {
		case <-st.work:
		case <-st.done:
			return st.why()
		case <-wire.Context().Done():
			return status.FromContextError(wire.Context().Err()).Err()
		case <-s.stop:
			return s.refuse(codes.Unavailable, meshpb.ReasonStopping, "the server is stopping: use another one")
		}
		subscribed := st.isSubscribed()
		var batch *meshpb.Batch
		var at catalog.Position
		var alive bool
		var err error
		s.pace.do(func() { batch, at, alive, err = s.feeds.collect(st) })
		if err != nil {
			return err
		}
		if batch != nil {
			if err := wire.Send(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Batch{Batch: batch}}); err != nil {
				return err //nolint:wrapcheck // gRPC's own
			}
			st.delivered(s.feeds.delays)
		}
		if subscribed {
			synced()
		}
		if alive {
			answer := &meshpb.Alive{Position: toWire(at)}
			if err := wire.Send(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Alive{Alive: answer}}); err != nil {
				return err //nolint:wrapcheck // gRPC's own
			}
		}
	}
}
