package rpc_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/store"
)

// knock opens a stream and says hello; welcomed is closed by the welcome, and done has
// the end.
func (c *cluster) knock(node string) (s *session, welcomed chan struct{}) {
	c.tb.Helper()
	ctx, cut := context.WithCancel(as(context.Background(), c.join(node)))
	s = &session{
		pipe: &pipe{ctx: ctx, up: make(chan *meshpb.SyncRequest), down: make(chan *meshpb.SyncResponse)},
		cut:  cut, done: make(chan error, 1),
	}
	go func() {
		var wire grpc.BidiStreamingServer[meshpb.SyncRequest, meshpb.SyncResponse] = s.pipe
		err := c.rpc.Sync(wire)
		s.cut()
		s.done <- err
	}()
	welcomed = make(chan struct{})
	go func() {
		select {
		case s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{Session: "s"}}}:
		case <-ctx.Done():
			return
		}
		select {
		case <-s.down:
			close(welcomed)
		case <-ctx.Done():
		}
	}()
	return s, welcomed
}

func is(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Streams begin in turns. A turn ends when the agent has what it asked for, or after two
// seconds; who gets none within five goes elsewhere. Streams that have begun need none.
func TestStreamsBeginInTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c, stopped := startIn(ctx, t, rpc.Config{Syncs: 1, JoinRate: 1e6}, store.NewMemory(), newAuthority(t))
		first, in := c.knock("vm-a")
		wait(0)
		if !is(in) {
			t.Fatal("the first has to wait")
		}
		second, in := c.knock("vm-b")
		wait(time.Second)
		if m := c.rpc.Metrics(); is(in) || m.Waiting != 1 || m.Syncing != 1 {
			t.Errorf("the second did not wait: %+v", m)
		}
		first.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: []*meshpb.Topic{{Kind: "node"}}}}}
		<-first.down
		wait(0)
		if !is(in) {
			t.Error("the first has everything, and the second still waits")
		}
		var silent []*session // subscribe to nothing: each keeps its turn for two seconds
		for i := range 4 {
			s, in := c.knock(fmt.Sprintf("vm-%d", i))
			silent = append(silent, s)
			wait(time.Millisecond)
			if is(in) {
				t.Errorf("stream %d did not wait", i)
			}
		}
		first.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{}}
		if m := <-first.down; m.GetAlive() == nil {
			t.Errorf("a stream that has begun: %v", m)
		}
		wait(5500 * time.Millisecond)
		select {
		case err := <-silent[3].done:
			if reasonOf(err) != meshpb.ReasonTooMany {
				t.Errorf("the last was refused: %v", err)
			}
		default:
			t.Error("the last still waits")
		}
		for _, s := range append(silent[:3], first, second) {
			s.hangUp()
		}
		cancel()
		stopped()
	})
}
