package agenttest

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/server/meshpb"
)

// stream is one open Sync. Server.mu guards it.
type stream struct {
	wanted map[view.Topic]bool
	queue  []*meshpb.SyncResponse
	more   chan struct{}
	cancel context.CancelFunc
}

func (st *stream) push(m *meshpb.SyncResponse) {
	st.queue = append(st.queue, m)
	select {
	case st.more <- struct{}{}:
	default:
	}
}

// Sync implements meshpb.MeshServer.
func (s *Server) Sync(gs grpc.BidiStreamingServer[meshpb.SyncRequest, meshpb.SyncResponse]) error {
	if err := s.admit(gs.Context(), "Sync"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(gs.Context())
	defer cancel()
	first, err := gs.Recv()
	if err != nil {
		return err
	}
	if first.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "the first message must be Hello")
	}
	st := &stream{wanted: map[view.Topic]bool{}, more: make(chan struct{}, 1), cancel: cancel}
	s.mu.Lock()
	s.hellos = append(s.hellos, first.GetHello())
	s.streams[st] = true
	lease := cmp.Or(s.Lease, 2*time.Second)
	st.push(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Welcome{Welcome: &meshpb.Welcome{
		Server: "s1", HeartbeatMs: Heartbeat.Milliseconds(), LeaseMs: lease.Milliseconds(),
	}}})
	s.note()
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.streams, st)
		s.note()
	}()
	go s.receive(gs, st)
	for {
		s.mu.Lock()
		queue := st.queue
		st.queue = nil
		s.mu.Unlock()
		for _, m := range queue {
			if err := gs.Send(m); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return status.Error(codes.Unavailable, "the server ends this stream")
		case <-st.more:
		}
	}
}

// receive reads until the stream ends, which it then ends for Sync too.
func (s *Server) receive(gs grpc.BidiStreamingServer[meshpb.SyncRequest, meshpb.SyncResponse], st *stream) {
	defer st.cancel()
	for {
		m, err := gs.Recv()
		if err != nil {
			return
		}
		s.mu.Lock()
		switch m := m.GetMessage().(type) {
		case *meshpb.SyncRequest_Heartbeat:
			if !s.silent {
				st.push(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Alive{Alive: &meshpb.Alive{Position: s.position()}}})
			}
		case *meshpb.SyncRequest_Subscribe:
			s.subscribe(st, m.Subscribe)
		case *meshpb.SyncRequest_Applied:
			s.applied[m.Applied.GetProxy()] = m.Applied
		}
		s.note()
		s.mu.Unlock()
	}
}

// subscribe sends all that is held of the topics that are new to the stream.
func (s *Server) subscribe(st *stream, m *meshpb.Subscribe) {
	b := &meshpb.Batch{Position: s.position()}
	wanted := map[view.Topic]bool{}
	var topics []view.Topic
	for _, wire := range m.GetTopics() {
		t := view.Topic{Kind: wire.GetKind(), Name: wire.GetName(), Source: wire.GetSource()}
		topics = append(topics, t)
		wanted[t] = true
		items, held := s.topics[t]
		if st.wanted[t] || !held {
			continue
		}
		b.Reset_ = append(b.Reset_, wire)
		for _, key := range slices.Sorted(maps.Keys(items)) {
			b.Items = append(b.Items, wireItem(t, key, items[key], s.revision))
		}
	}
	st.wanted = wanted
	s.subscriptions = append(s.subscriptions, topics)
	st.push(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Batch{Batch: b}})
}

func wireItem(t view.Topic, key string, data []byte, revision uint64) *meshpb.Item {
	return &meshpb.Item{Topic: &meshpb.Topic{Kind: t.Kind, Name: t.Name, Source: t.Source}, Key: key, Json: data, Revision: revision}
}
