package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/meshd/meshd/server/client"
)

// stream sends what ask emits as server-sent events, until the caller leaves, may
// no longer see it, or the server stops. A caller who does not read is cut in the
// end; until then he costs nobody anything but a queue. Shown is what of a piece he
// may see when it is sent.
func stream[T any](a *API, c *call, ask func(ctx context.Context, emit func(T) error) error, shown func(T) T) (any, error) {
	leave, err := a.takeWatch()
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := context.WithCancel(c.Context())
	pieces, ended := make(chan T), make(chan error, 1)
	var asking sync.WaitGroup
	asking.Go(func() {
		ended <- ask(ctx, func(piece T) error {
			select {
			case pieces <- piece:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	sendPieces(a, c, pieces, ended, shown)
	cancel()
	asking.Wait()
	return written{}, nil
}

// sendPieces sends pieces until there are no more, or nobody who wants them.
func sendPieces[T any](a *API, c *call, pieces <-chan T, ended <-chan error, shown func(T) T) {
	e := newEvents(c.out)
	defer e.release()
	e.buffer.WriteString(": welcome\n\n") // so that the caller knows that it may
	heartbeat := time.NewTicker(a.cfg.Heartbeat)
	defer heartbeat.Stop()
	expired, stop := c.expired(a.cfg.Now())
	defer stop()
	for e.flush() == nil {
		var piece *T
		select {
		case one := <-pieces:
			piece = &one
		case <-expired:
		case <-heartbeat.C:
			e.buffer.WriteString(": alive\n\n")
		case err := <-ended:
			if err == nil {
				err = errors.New("the answers ended")
			}
			e.end(&client.Error{Code: client.CodeUnavailable, Message: err.Error(), Next: "try again in a moment"})
			return
		case <-c.Context().Done():
			return
		case <-a.ending:
			return
		}
		if c.cut = c.allowed(); c.cut != nil {
			e.end(c.cut)
			return
		}
		if piece != nil {
			e.event(client.EventAnswer, shown(*piece))
		}
	}
}
