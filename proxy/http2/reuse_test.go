package http2_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// An exchange that is closed at any moment, before it has a stream, too, is over for itself alone: what
// it leaves is used by others at once, and none of them ends with it.
func TestClosedAtAnyMoment(t *testing.T) {
	t.Parallel()
	far := serve(t, handler(func(*l7.Exchange) l7.Response { return text("ok") }), func(c *http2.ServerConfig) { c.Bounds.Resets = 1 << 30 })
	far.recs.off.Store(true)
	pool := newPool(t, far.addr, func(c *http2.PoolConfig) { c.MaxConns, c.HTTP2.Streams = 1, 8 })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5000 {
				resp := pool.Forward(newExchange("GET /", nil))
				_, err := resp.Head(noWait{})
				resp.Close()
				if err != nil && !errors.Is(err, l7.ErrPending) {
					t.Errorf("got %v", err)
					return
				}
			}
		})
		wg.Go(func() {
			for range 500 {
				if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Body != "ok" || g.Reason != l7.None {
					t.Errorf("got %+v", g)
					return
				}
			}
		})
	}
	wg.Wait()
}
