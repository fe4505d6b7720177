package agenttest

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	"github.com/meshd/meshd/server/meshpb"
)

// Watch is an agent's open second stream. One goroutine at a time uses it.
type Watch struct {
	wire  grpc.BidiStreamingServer[meshpb.WatchAnswer, meshpb.WatchQuery]
	other []*meshpb.WatchAnswer // to questions that nobody waited for yet
}

// Watch implements meshpb.MeshServer.
func (s *Server) Watch(wire grpc.BidiStreamingServer[meshpb.WatchAnswer, meshpb.WatchQuery]) error {
	if err := s.admit(wire.Context(), "Watch"); err != nil {
		return err
	}
	s.mu.Lock()
	s.watch = &Watch{wire: wire}
	s.note()
	s.mu.Unlock()
	<-wire.Context().Done()
	return nil
}

// Watched returns the newest second stream, nil if none was opened before ctx
// ended.
func (s *Server) Watched(ctx context.Context) *Watch {
	for {
		s.mu.Lock()
		w, more := s.watch, s.changed
		s.mu.Unlock()
		if w != nil {
			return w
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil
		}
	}
}

// Ask sends a query as it is; an empty one takes the question back.
func (w *Watch) Ask(id uint64, query []byte) error {
	return w.wire.Send(&meshpb.WatchQuery{Id: id, Query: query})
}

// Answer returns the next piece of the answer to a question.
func (w *Watch) Answer(id uint64) ([]byte, error) {
	for i, m := range w.other {
		if m.GetId() == id {
			w.other = append(w.other[:i], w.other[i+1:]...)
			return m.GetAnswer(), nil
		}
	}
	for {
		m, err := w.wire.Recv()
		if err != nil {
			return nil, fmt.Errorf("wait for an answer: %w", err)
		}
		if m.GetId() == id {
			return m.GetAnswer(), nil
		}
		w.other = append(w.other, m)
	}
}
