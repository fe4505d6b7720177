package view

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/meshd/meshd/server/meshpb"
)

// errSilent ends a stream on which the server says nothing: it is dead, or the
// connection is half open.
var errSilent = errors.New("the server fell silent")

// errRenewed ends a stream by Reconnect.
var errRenewed = errors.New("the node's certificate is new: connecting again")

// syncStream is the client's side of Mesh.Sync.
type syncStream = grpc.BidiStreamingClient[meshpb.SyncRequest, meshpb.SyncResponse]

// stream holds one stream to one server until it breaks or ctx ends. welcomed
// says that the server took this node.
func (v *View) stream(ctx context.Context, server string) (welcomed bool, err error) {
	conn, err := v.cfg.Dial(server)
	if err != nil {
		return false, fmt.Errorf("dial: %w", err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	v.mu.Lock()
	v.hangUp = cancel
	v.mu.Unlock()
	if err := reach(ctx, conn); err != nil {
		return false, cause(ctx, err)
	}
	watchdog := time.AfterFunc(welcomeTimeout, func() { cancel(errSilent) })
	defer watchdog.Stop()

	client := meshpb.NewMeshClient(conn)
	s, err := client.Sync(ctx)
	if err != nil {
		return false, cause(ctx, err)
	}
	hello := v.cfg.Hello()
	if err := s.Send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{
		Session: hello.Session, Version: hello.Version, FeatureLevel: int32(hello.FeatureLevel), Address: hello.Address, //nolint:gosec // a small constant
	}}}); err != nil && !errors.Is(err, io.EOF) { // io.EOF: Recv has the reason
		return false, cause(ctx, err)
	}
	first, err := s.Recv()
	if err != nil {
		return false, cause(ctx, err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, fmt.Errorf("%w: the first message is no welcome", ErrProtocol)
	}
	heartbeat := millis(welcome.GetHeartbeatMs(), defaultHeartbeat)
	// There has to be time to find another server before the lease is over.
	patience := max(millis(welcome.GetLeaseMs(), defaultLease)*3/5, 2*heartbeat)
	watchdog.Reset(patience)

	v.cfg.Log.InfoContext(ctx, "connected to a server", slog.String("server", server), slog.String("server_id", welcome.GetServer()))
	v.setLink(&Link{Client: client, Server: server, ID: welcome.GetServer(), Since: time.Now()})
	defer v.setLink(nil)
	state := &shared{session: newSession()}
	var writer sync.WaitGroup
	writer.Go(func() { v.write(ctx, cancel, s, state, heartbeat) })
	defer writer.Wait()
	defer cancel(nil)
	return true, cause(ctx, v.read(s, state, func() { watchdog.Reset(patience) }))
}

// reach waits until there is a connection, or why there is none can be told by the
// first call.
func reach(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready && state != connectivity.TransientFailure; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("no connection within %s", connectTimeout)
		}
	}
	return nil
}

// shared is the session between the stream's two goroutines.
type shared struct {
	mu      sync.Mutex
	session *session
}

// read applies what the server sends until the stream ends.
func (v *View) read(s syncStream, state *shared, heard func()) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		heard()
		state.mu.Lock()
		switch m := m.GetMessage().(type) {
		case *meshpb.SyncResponse_Batch:
			next, changed, err := state.session.batch(v.Snapshot(), m.Batch)
			if err != nil {
				state.mu.Unlock()
				return err
			}
			v.set(next, changed, time.Time{})
		case *meshpb.SyncResponse_Alive:
			next, changed := state.session.alive(v.Snapshot(), m.Alive)
			v.set(next, changed, time.Now())
		default: // a message of a later version
		}
		state.mu.Unlock()
	}
}

// write sends heartbeats, the subscription and what proxies applied. When it
// fails it cancels the stream, which ends read.
func (v *View) write(ctx context.Context, cancel context.CancelCauseFunc, s syncStream, state *shared, heartbeat time.Duration) {
	v.mu.Lock()
	for proxy := range v.applied {
		v.unsent[proxy] = true
	}
	v.mu.Unlock()
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	var sent []Topic
	first := true
	for {
		v.mu.Lock()
		wanted, news := v.wanted, v.wantedNew
		var reports []Applied
		for _, proxy := range slices.Sorted(maps.Keys(v.unsent)) {
			reports = append(reports, v.applied[proxy])
		}
		clear(v.unsent)
		v.mu.Unlock()

		var err error
		if first || !slices.Equal(wanted, sent) {
			err = state.subscribe(s, wanted)
			sent, first = wanted, false
		}
		for _, a := range reports {
			if err == nil {
				err = s.Send(appliedMessage(a))
			}
		}
		if err != nil {
			v.writeFailed(cancel, err)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-news:
		case <-ticker.C:
			if err := state.beat(s); err != nil {
				v.writeFailed(cancel, err)
				return
			}
		}
	}
}

// writeFailed ends the stream, unless the server ended it: then Recv has the
// reason.
func (*View) writeFailed(cancel context.CancelCauseFunc, err error) {
	if !errors.Is(err, io.EOF) {
		cancel(err)
	}
}

// subscribe sends the set, and notes it before any answer can come.
func (sh *shared) subscribe(s syncStream, topics []Topic) error {
	sh.mu.Lock()
	sh.session.subscribe(topics)
	sh.mu.Unlock()
	m := &meshpb.Subscribe{Topics: make([]*meshpb.Topic, len(topics))}
	for i, t := range topics {
		m.Topics[i] = t.wire()
	}
	return s.Send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: m}})
}

func (sh *shared) beat(s syncStream) error {
	sh.mu.Lock()
	sh.session.sent++
	sh.mu.Unlock()
	return s.Send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{Heartbeat: &meshpb.Heartbeat{}}})
}

func appliedMessage(a Applied) *meshpb.SyncRequest {
	return &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Applied{Applied: &meshpb.Applied{
		Proxy:           a.Proxy,
		Position:        &meshpb.Position{Generation: a.Position.Generation, Revision: a.Position.Revision},
		Refused:         a.Refused,
		RefusedPosition: &meshpb.Position{Generation: a.RefusedPosition.Generation, Revision: a.RefusedPosition.Revision},
		Closed:          a.Closed,
	}}}
}

// cause prefers the reason for which the stream was cancelled from here.
func cause(ctx context.Context, err error) error {
	if why := context.Cause(ctx); why != nil && !errors.Is(why, context.Canceled) {
		return why
	}
	if err == nil || errors.Is(err, io.EOF) {
		return errors.New("the server ended the stream")
	}
	return err
}

func millis(ms int64, otherwise time.Duration) time.Duration {
	if ms <= 0 || ms > time.Hour.Milliseconds() {
		return otherwise
	}
	return time.Duration(ms) * time.Millisecond
}
