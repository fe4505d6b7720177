package http2_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// Each flood ends its connection with ENHANCE_YOUR_CALM, in an error of its own
// and a counter, and holds no memory to speak of.
func TestFloods(t *testing.T) { //nolint:paralleltest // memory is measured
	const most = 20000
	before := heap()
	newStreams := func(each func(r *raw, id uint32)) func(r *raw) {
		return func(r *raw) {
			r.check(r.WriteSettingsAck()) // else it could not know better
			for id := uint32(1); id < 2*most; id += 2 {
				each(r, id)
			}
		}
	}
	repeat := func(each func(r *raw) error) func(r *raw) {
		return func(r *raw) {
			r.request(1, false, "POST", "/hang")
			for range most {
				if each(r) != nil {
					return
				}
			}
		}
	}
	floods := map[string]struct {
		send  func(r *raw)
		err   error
		count func(c *http2.Counters) uint64
	}{
		"rapid reset": {newStreams(func(r *raw, id uint32) {
			r.request(id, true, "GET", "/hang")
			r.check(r.WriteRSTStream(id, xhttp2.ErrCodeCancel))
		}), http2.ErrResets, func(c *http2.Counters) uint64 { return c.Resets.Load() }},
		"made you reset by a window": {newStreams(func(r *raw, id uint32) {
			r.request(id, true, "GET", "/hang")
			r.check(r.WriteWindowUpdate(id, 0))
		}), http2.ErrResets, func(c *http2.Counters) uint64 { return c.Resets.Load() }},
		"made you reset by a priority": {newStreams(func(r *raw, id uint32) {
			r.request(id, true, "GET", "/hang")
			r.check(r.WriteRawFrame(xhttp2.FramePriority, 0, id, make([]byte, 4)))
		}), http2.ErrResets, func(c *http2.Counters) uint64 { return c.Resets.Load() }},
		"made you reset by malformed requests": {newStreams(func(r *raw, id uint32) {
			r.head(id, true, ":method: GET")
		}), http2.ErrResets, func(c *http2.Counters) uint64 { return c.Resets.Load() }},
		"too many streams": {newStreams(func(r *raw, id uint32) {
			r.request(id, true, "GET", "/hang")
		}), http2.ErrResets, func(c *http2.Counters) uint64 { return c.Resets.Load() }},
		"CONTINUATION": {func(r *raw) {
			r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method: GET")}))
			for range most {
				if r.WriteContinuation(1, false, r.block("a: b")) != nil {
					return
				}
			}
		}, http2.ErrContinuations, func(c *http2.Counters) uint64 { return c.Continuations.Load() }},
		"a long block": {func(r *raw) {
			r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method: GET")}))
			for range 8 {
				if r.WriteContinuation(1, false, make([]byte, 16<<10)) != nil {
					return
				}
			}
		}, http2.ErrContinuations, func(c *http2.Counters) uint64 { return c.Continuations.Load() }},
		"PING":     {repeat(func(r *raw) error { return r.WritePing(false, [8]byte{}) }), nil, nil},
		"SETTINGS": {repeat(func(r *raw) error { return r.WriteSettings() }), nil, nil},
		"PRIORITY": {
			repeat(func(r *raw) error { return r.WritePriority(7, xhttp2.PriorityParam{}) }),
			http2.ErrControl, func(c *http2.Counters) uint64 { return c.Control.Load() },
		},
		"empty DATA": {
			repeat(func(r *raw) error { return r.WriteData(1, false, nil) }),
			http2.ErrControl, func(c *http2.Counters) uint64 { return c.Control.Load() },
		},
		"padding alone": {
			repeat(func(r *raw) error { return r.WriteDataPadded(1, false, nil, []byte{0}) }),
			http2.ErrControl, func(c *http2.Counters) uint64 { return c.Control.Load() },
		},
		"WINDOW_UPDATE": {
			repeat(func(r *raw) error { return r.WriteWindowUpdate(1, 1) }),
			http2.ErrControl, func(c *http2.Counters) uint64 { return c.Control.Load() },
		},
		"unknown frames": {
			repeat(func(r *raw) error { return r.WriteRawFrame(0x77, 0, 0, []byte("x")) }),
			http2.ErrControl, func(c *http2.Counters) uint64 { return c.Control.Load() },
		},
	}
	t.Run("floods", func(t *testing.T) {
		for name, c := range floods {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				s := serve(t, handler(echoHead), nil)
				r := dialRaw(t, s.addr)
				c.send(r)
				err := s.end(t)
				var e *http2.ConnError
				if !errors.As(err, &e) || e.Code != http2.EnhanceYourCalm {
					t.Fatalf("Serve returned %v", err)
				}
				if c.err == nil { // whichever of two comes first
					if n := s.count.Control.Load() + s.count.Answers.Load(); n != 1 {
						t.Errorf("counters say %d", n)
					}
					return
				}
				if !errors.Is(err, c.err) || c.count(&s.count) != 1 {
					t.Errorf("Serve returned %v, the counter says %d", err, c.count(&s.count))
				}
			})
		}
	})
	if grown := int64(heap()) - int64(before); grown > 8<<20 {
		t.Errorf("%d KiB are held after them", grown>>10)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A block whose fields expand without bound is refused, and costs what its
// bytes cost.
func TestCompressionBomb(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echoHead), nil)
	r := dialRaw(t, s.addr)
	b := r.block(":method: GET", ":scheme: http", ":authority: a", ":path: /", "a: "+strings.Repeat("x", 3000))
	b = append(b, bytes.Repeat([]byte{0x80 | 62}, 12<<10)...) // 36 MB of fields
	r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: b, EndHeaders: true, EndStream: true}))
	if got := r.outcome(1); got.status != "431" {
		t.Errorf("got %+v", got)
	}
	if n := s.count.HeadTooLarge.Load(); n != 1 {
		t.Errorf("the counter says %d", n)
	}
	r.request(3, true, "GET", "/")
	if got := r.outcome(3); got.status != "200" {
		t.Errorf("the next request got %+v", got)
	}
}

// More streams than allowed are refused, so that the client may send them again,
// and the others go on.
func TestStreamsAreLimited(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echoHead), func(c *http2.ServerConfig) { c.Bounds.Streams = 3 })
	r := dialRaw(t, s.addr)
	for id := uint32(1); id < 7; id += 2 {
		r.request(id, true, "GET", "/hang")
	}
	r.request(7, true, "GET", "/")
	if got := r.outcome(7); got.reset != xhttp2.ErrCodeRefusedStream {
		t.Errorf("got %+v", got)
	}
	r.check(r.WriteRSTStream(1, xhttp2.ErrCodeCancel))
	if rec := s.recs.next(t); rec.Reason != l7.ClientGone {
		t.Errorf("record %+v", rec)
	}
	refused := uint64(1)
	for id := uint32(9); ; id += 2 { // the record is told just before the stream is free
		r.request(id, true, "GET", "/")
		got := r.outcome(id)
		if got.status == "200" {
			break
		}
		if refused++; got.reset != xhttp2.ErrCodeRefusedStream || id > 2000 {
			t.Fatalf("got %+v", got)
		}
	}
	if n := s.count.Refused.Load(); n != refused {
		t.Errorf("the counter says %d of %d", n, refused)
	}
}

// Who does not know our settings yet may send too much once.
func TestStreamsBeforeSettings(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echoHead), nil)
	r := dialRaw(t, s.addr)
	const last = 2*400 - 1 // it has not read ours
	for id := uint32(1); id < last; id += 2 {
		r.request(id, true, "GET", "/hang")
	}
	r.check(r.WriteRSTStream(1, xhttp2.ErrCodeCancel))
	if rec := s.recs.next(t); rec.Reason != l7.ClientGone {
		t.Errorf("record %+v", rec)
	}
	r.request(last, true, "GET", "/")
	if got := r.outcome(last); got.status != "200" {
		t.Errorf("got %+v", got)
	}
	if n := s.count.Refused.Load(); n != 299 {
		t.Errorf("the counter says %d", n)
	}
}

// A client that asks without reading the answers is not given memory for them.
func TestUnreadAnswers(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(func(*l7.Exchange) l7.Response {
		return &answer{head: l7.ResponseHead{Status: 200, Length: -1}, body: &endless{}}
	}), func(c *http2.ServerConfig) { c.Bounds.Control = 1 << 30 })
	r := dialRaw(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1<<31 - 1})
	r.check(r.WriteWindowUpdate(0, 1<<31-1-65535))
	r.request(1, true, "GET", "/")
	for r.WritePing(false, [8]byte{}) == nil { // nothing is read
		if s.count.Answers.Load() > 0 {
			break
		}
	}
	if err := s.end(t); !errors.Is(err, http2.ErrAnswers) {
		t.Errorf("Serve returned %v", err)
	}
}

// endless is a body without end.
type endless struct{ b [16 << 10]byte }

func (e *endless) Next(limit int, _ l7.Waker) ([]byte, error) { return e.b[:min(limit, len(e.b))], nil }
func (*endless) Trailers() http1.Fields                       { return nil }
func (*endless) Cancel(l7.Reason)                             {}
func (*endless) Blocking() bool                               { return false }

// Clients that are slow on purpose.
func TestTimes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(c *http2.ServerConfig)
		send   func(r *raw)
		silent bool
		check  func(r *raw, err error) string
	}{
		"no preface": {
			change: func(c *http2.ServerConfig) { c.HeadTimeout = 500 * time.Millisecond },
			silent: true, send: func(r *raw) { r.bytes("PRI * ") },
			check: func(_ *raw, err error) string { return wantErr(err, http2.ErrHeadTimeout) },
		},
		"an unfinished head": {
			change: func(c *http2.ServerConfig) { c.HeadTimeout = 500 * time.Millisecond },
			send: func(r *raw) {
				r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method: GET")}))
			},
			check: func(_ *raw, err error) string { return wantErr(err, http2.ErrHeadTimeout) },
		},
		"idle": {
			change: func(c *http2.ServerConfig) { c.IdleTimeout = 500 * time.Millisecond },
			send:   func(*raw) {},
			check: func(r *raw, err error) string {
				if got := r.outcome(1); !got.isGone || got.goAway != xhttp2.ErrCodeNo || err != nil {
					return fmt.Sprintf("got %+v, %v", got, err)
				}
				return ""
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, handler(echoHead), c.change)
			r := dialSilent(t, s.addr)
			if !c.silent {
				r.bytes(xhttp2.ClientPreface)
				r.check(r.WriteSettings())
			}
			c.send(r)
			if problem := c.check(r, s.end(t)); problem != "" {
				t.Error(problem)
			}
		})
	}
}

func wantErr(got, want error) string {
	if errors.Is(got, want) {
		return ""
	}
	return fmt.Sprintf("Serve returned %v, want %v", got, want)
}

// A body that does not come, and a client that takes nothing, end their own
// exchange only.
func TestSilence(t *testing.T) {
	t.Parallel()
	served := func(t *testing.T) *serving {
		t.Helper()
		return serve(t, handler(echo), func(c *http2.ServerConfig) {
			c.StreamIdle, c.BodyGrace = 500*time.Millisecond, 500*time.Millisecond
		})
	}
	t.Run("stream idle", func(t *testing.T) {
		t.Parallel()
		s := served(t)
		r := dialRaw(t, s.addr)
		r.request(1, false, "POST", "/")
		if got := r.outcome(1); got.reset != xhttp2.ErrCodeCancel || got.status != "200" {
			t.Errorf("got %+v", got)
		}
		if rec := s.recs.next(t); rec.Reason != l7.RequestTimeout {
			t.Errorf("record %+v", rec)
		}
	})
	t.Run("slower than a body may be", func(t *testing.T) {
		t.Parallel()
		s := served(t)
		r := dialRaw(t, s.addr)
		r.request(1, false, "POST", "/", "content-length: 100000")
		r.data(1, false, "a")
		if got := r.outcome(1); got.reset != xhttp2.ErrCodeCancel {
			t.Errorf("got %+v", got)
		}
		if rec := s.recs.next(t); rec.Reason != l7.RequestTimeout {
			t.Errorf("record %+v", rec)
		}
	})
	t.Run("no window", func(t *testing.T) {
		t.Parallel()
		s := served(t)
		r := dialRaw(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 0})
		r.request(1, false, "POST", "/")
		r.data(1, true, "abc")
		if got := r.outcome(1); got.reset != xhttp2.ErrCodeCancel || got.body != "" {
			t.Errorf("got %+v", got)
		}
		if rec := s.recs.next(t); rec.Reason != l7.ClientGone || !errors.Is(rec.Err, http2.ErrStalled) {
			t.Errorf("record %+v", rec)
		}
		if n := s.count.Stalled.Load(); n != 1 {
			t.Errorf("the counter says %d", n)
		}
	})
}
