package http2_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// A connection that was not used for long is asked whether it lives, along with its next requests. If it doesn't, they are told
// after the time that the answer may take, or sent again where they may; later ones go elsewhere at once.
func TestPoolAfterLongIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var dials, pings atomic.Int32
		pool := http2.NewPool(http2.PoolConfig{
			IdleTimeout: -1, PingAfter: 15 * time.Second, PingTimeout: 5 * time.Second,
			Dial: func(context.Context) (net.Conn, error) {
				near, far := net.Pipe()
				n := dials.Add(1)
				lives := n > 1
				go func() {
					p := newRawPeer(t, far, nil)
					if p == nil {
						t.Error("no preface came")
						return
					}
					_ = far.SetDeadline(time.Time{})
					for first := true; ; first = false {
						switch f := p.next(xhttp2.FrameHeaders, xhttp2.FramePing).(type) {
						case *xhttp2.MetaHeadersFrame:
							if lives || first {
								p.answer(f.StreamID, "ok")
							}
						case *xhttp2.PingFrame:
							pings.Add(1)
							if lives {
								_ = p.WritePing(true, f.Data)
							}
						default:
							_ = far.Close() // the end
							return
						}
					}
				}()
				return near, nil
			},
		})
		if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Body != "ok" {
			t.Fatalf("got %+v", g)
		}
		<-time.After(time.Hour) // of the test's own clock
		begun := time.Now()
		got := make(chan got, 2)
		for _, request := range []string{"POST /", "GET /"} {
			go func() { got <- pull(pool.Forward(newExchange(request, nil)), false) }()
		}
		reset, repeated := <-got, <-got
		if reset.Reason == l7.None {
			reset, repeated = repeated, reset
		}
		if took := time.Since(begun); reset.Reason != l7.UpstreamReset || repeated.Body != "ok" || took < 5*time.Second || took > 8*time.Second {
			t.Errorf("after %s the POST got %+v, the GET %+v", took, reset, repeated)
		}
		begun = time.Now()
		if g := pull(pool.Forward(newExchange("POST /", nil)), false); g.Body != "ok" || time.Since(begun) > time.Second {
			t.Errorf("after %s the next one got %+v", time.Since(begun), g)
		}
		if dials.Load() != 2 || pings.Load() != 1 {
			t.Errorf("%d connections, %d questions, want 2 and 1", dials.Load(), pings.Load())
		}
		pool.CloseIdle()
	})
}
