package http2_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/l7"
)

// wait fails the test if nothing comes.
func wait[T any](tb testing.TB, c <-chan T) T {
	tb.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		tb.Fatal("it did not happen")
		panic("unreachable")
	}
}

// A drain lets what is under way end, and serves what was on its way.
func TestDrains(t *testing.T) {
	t.Parallel()
	gate, asked := make(chan struct{}), make(chan struct{}, 10)
	p := over1(t, func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-gate
		_, _ = io.WriteString(w, "late")
	})
	s := serve(t, p2h(p), nil)
	r := dialRaw(t, s.addr)
	r.request(1, true, "GET", "/")
	wait(t, asked)
	s.conn().Drain()
	f, ok := r.next().(*xhttp2.GoAwayFrame)
	if !ok || f.LastStreamID != 1<<31-1 || f.ErrCode != xhttp2.ErrCodeNo {
		t.Fatalf("got %v, want the first GOAWAY", f)
	}
	r.request(3, true, "GET", "/") // it was on its way
	wait(t, asked)
	ping, ok := r.next().(*xhttp2.PingFrame)
	if !ok || ping.IsAck() {
		t.Fatalf("got %v, want a PING", ping)
	}
	r.check(r.WritePing(true, ping.Data))
	f, ok = r.next().(*xhttp2.GoAwayFrame)
	if !ok || f.LastStreamID != 3 {
		t.Fatalf("got %v, want the second GOAWAY", f)
	}
	r.request(5, true, "GET", "/") // the client was told
	close(gate)
	bodies := 0
	for f := r.next(); f != nil; f = r.next() {
		if d, ok := f.(*xhttp2.DataFrame); ok && string(d.Data()) == "late" {
			bodies++
		}
		if f.Header().StreamID == 5 {
			t.Errorf("got %v on a stream that is not served", f)
		}
	}
	if bodies != 2 {
		t.Errorf("%d of 2 answers came", bodies)
	}
	if err := s.end(t); err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// An idle connection is closed at once by a drain, an answer to whose PING comes.
func TestDrainOfIdle(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echoHead), nil)
	c := client(t)
	fetch(t, c, newRequestTo(t, "GET", "http://"+s.addr+"/", nil)) //nolint:bodyclose // fetch did
	s.conn().Drain()
	if err := s.end(t); err != nil {
		t.Errorf("Serve returned %v", err)
	}
	if resp, _ := fetch(t, c, newRequestTo(t, "GET", "http://"+s.addr+"/", nil)); resp.StatusCode != 200 { //nolint:bodyclose // fetch did
		t.Errorf("the next request got %d", resp.StatusCode)
	}
}

// What a client resets, what is aborted and what is reviewed away is cancelled
// on the other side, with the reason.
func TestCancels(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		cancel func(s *serving, r *raw)
		reason l7.Reason
		reset  bool
		gone   bool
	}{
		"reset":            {func(_ *serving, r *raw) { r.check(r.WriteRSTStream(1, xhttp2.ErrCodeCancel)) }, l7.ClientGone, false, false},
		"the client goes":  {func(_ *serving, r *raw) { _ = r.nc.Close() }, l7.ClientGone, false, true},
		"abort":            {func(s *serving, _ *raw) { s.conn().Abort(l7.PolicyChanged) }, l7.PolicyChanged, false, true},
		"a broken frame":   {func(_ *serving, r *raw) { r.check(r.WriteWindowUpdate(0, 0)) }, l7.ClientGone, false, true},
		"malformed stream": {func(_ *serving, r *raw) { r.check(r.WriteWindowUpdate(1, 0)) }, l7.BadRequest, true, false},
		"review": {func(s *serving, _ *raw) {
			s.conn().Review(func(ex *l7.Exchange) l7.Reason {
				if string(ex.Request.Path) == "/hang" {
					return l7.PolicyChanged
				}
				return l7.None
			})
		}, l7.PolicyChanged, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			closed, handled := make(chan l7.Reason, 1), make(chan struct{}, 2)
			s := serve(t, handler(func(ex *l7.Exchange) l7.Response {
				handled <- struct{}{}
				if string(ex.Request.Path) == "/hang" {
					return &hanging{closed: closed}
				}
				return &answer{head: l7.ResponseHead{Status: 200, Length: -1}, body: ex.Body}
			}), nil)
			r := dialRaw(t, s.addr)
			r.request(1, true, "GET", "/hang")
			r.request(3, false, "POST", "/")
			wait(t, handled)
			wait(t, handled)
			c.cancel(s, r)
			if reason := wait(t, closed); reason != c.reason {
				t.Errorf("the response was closed with reason %q, want %q", reason, c.reason)
			}
			if c.gone {
				if err := s.end(t); err == nil {
					t.Error("Serve returned no error")
				}
				return
			}
			if rec := s.recs.next(t); rec.Reason != c.reason || rec.Status != 0 {
				t.Errorf("record %+v", rec)
			}
			if c.reset {
				for f := r.next(); ; f = r.next() {
					if f == nil {
						t.Fatal("no reset came")
					}
					if _, ok := f.(*xhttp2.RSTStreamFrame); ok && f.Header().StreamID == 1 {
						break
					}
				}
			}
			r.data(3, true, "abc") // the neighbour goes on
			if got := r.outcome(3); got.body != "abc" || !got.ended {
				t.Errorf("the other stream got %+v", got)
			}
		})
	}
}

// An answer that does not wait for the request's body is whole, and the rest of
// the body is not wanted.
func TestEarlyResponse(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(func(ex *l7.Exchange) l7.Response {
		return ex.Fail(&l7.Error{Reason: l7.Denied})
	}), nil)
	r := dialRaw(t, s.addr)
	r.request(1, false, "POST", "/")
	got := r.outcome(1)
	if got.status != "403" || !got.ended || !strings.Contains(got.body, "denied") {
		t.Errorf("got %+v", got)
	}
	if f, ok := r.next().(*xhttp2.RSTStreamFrame); !ok || f.ErrCode != xhttp2.ErrCodeNo {
		t.Errorf("got %v, want a reset without an error", f)
	}
	// What is on its way does not cost the connection its window.
	for range 200 {
		r.data(1, false, strings.Repeat("x", 8<<10))
	}
	r.request(3, true, "GET", "/")
	if got := r.outcome(3); got.status != "403" {
		t.Errorf("got %+v", got)
	}
}

// Kinds of responses.
func TestResponseKinds(t *testing.T) {
	t.Parallel()
	head := func(status int, length int64, none bool) l7.ResponseHead {
		return l7.ResponseHead{Status: status, Length: length, NoBody: none}
	}
	for name, c := range map[string]struct {
		method string
		answer *answer
		want   outcome
	}{
		"HEAD":    {"HEAD", &answer{head: head(200, 1000, true)}, outcome{status: "200", ended: true}},
		"204":     {"GET", &answer{head: head(204, -1, true)}, outcome{status: "204", ended: true}},
		"304":     {"GET", &answer{head: head(304, 5, true)}, outcome{status: "304", ended: true}},
		"nothing": {"GET", &answer{head: head(200, 0, false)}, outcome{status: "200", ended: true}},
		"interim": {
			"GET", &answer{head: head(200, 1, false), text: []byte("x"), interim: []l7.ResponseHead{head(100, -1, true), head(103, -1, true)}},
			outcome{status: "200", interim: "100 103 ", body: "x", ended: true},
		},
		"trailers": {
			"GET", &answer{head: head(200, -1, false), text: []byte("x"), trailers: fields("Grpc-Status", "0", "Content-Length", "7")},
			outcome{status: "200", body: "x", trailer: "grpc-status=0 ", ended: true},
		},
		"trailers alone": {
			"GET", &answer{head: head(200, -1, false), trailers: fields("Grpc-Status", "0")},
			outcome{status: "200", trailer: "grpc-status=0 ", ended: true},
		},
		"less than declared": {"GET", &answer{head: head(200, 5, false), text: []byte("x")}, outcome{status: "200", reset: xhttp2.ErrCodeInternal, isReset: true}},
		"more than declared": {"GET", &answer{head: head(200, 1, false), text: []byte("xyz")}, outcome{status: "200", reset: xhttp2.ErrCodeInternal, isReset: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, handler(func(*l7.Exchange) l7.Response { return c.answer }), nil)
			r := dialRaw(t, s.addr)
			r.request(1, true, c.method, "/")
			if got := r.outcome(1); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

// A websocket over HTTP/2 reaches a server of HTTP/1, and its end is both ends.
func TestWebsocketOverHTTP1(t *testing.T) {
	t.Parallel()
	p := over1(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || len(r.Header.Get("Sec-Websocket-Key")) != 24 || r.URL.Path != "/chat" {
			t.Errorf("the server got %v", r.Header)
		}
		nc, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close() //nolint:errcheck // the end of it
		_, _ = io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n")
		b := make([]byte, 5)
		if _, err := io.ReadFull(rw, b); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(nc, "back "+string(b))
	})
	s := serve(t, p2h(p), nil)
	r := dialRaw(t, s.addr)
	r.head(1, false, ":method: CONNECT", ":protocol: websocket", ":scheme: http", ":authority: a", ":path: /chat", "sec-websocket-version: 13")
	f, ok := r.next().(*xhttp2.MetaHeadersFrame)
	if !ok || f.PseudoValue("status") != "200" || f.StreamEnded() || len(f.RegularFields()) != 0 {
		t.Fatalf("got %v", f)
	}
	r.data(1, false, "hel")
	r.data(1, false, "lo")
	if got := r.outcome(1); got.body != "back hello" || !got.ended {
		t.Errorf("got %+v", got)
	}
	if rec := s.recs.next(t); rec.Status != 101 {
		t.Errorf("record %+v", rec)
	}
}

// Windows hold, also when they shrink below nothing, and a stream without one
// costs the others nothing.
func TestWindows(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(func(*l7.Exchange) l7.Response {
		return text(strings.Repeat("x", 100_000))
	}), nil)
	r := dialRaw(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1000})
	r.request(1, true, "GET", "/")
	got := map[uint32]int{}
	read := func(id uint32, n int) {
		t.Helper()
		for got[id] < n {
			f := r.next()
			if f == nil {
				t.Fatal("the connection ended")
			}
			if d, ok := f.(*xhttp2.DataFrame); ok {
				got[d.StreamID] += len(d.Data())
			}
		}
		if got[id] != n {
			t.Fatalf("stream %d got %d bytes, its window was %d", id, got[id], n)
		}
	}
	read(1, 1000)
	r.check(r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 400})) // -600
	r.check(r.WriteWindowUpdate(1, 600))
	r.request(3, true, "GET", "/")
	read(3, 400)
	r.check(r.WriteWindowUpdate(1, 100))
	read(1, 1100)
	r.check(r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 100_000}))
	// From here on the connection's window is the limit: both get their share.
	for got[1]+got[3] < 65535 {
		read1 := r.next()
		if d, ok := read1.(*xhttp2.DataFrame); ok {
			got[d.StreamID] += len(d.Data())
		}
	}
	if got[1]+got[3] != 65535 || got[1] < 20_000 || got[3] < 20_000 {
		t.Errorf("got %v", got)
	}
	r.check(r.WriteWindowUpdate(0, 200_000))
	for ended := 0; ended < 2; {
		d, ok := r.next().(*xhttp2.DataFrame)
		if !ok {
			continue
		}
		got[d.StreamID] += len(d.Data())
		if d.StreamEnded() {
			ended++
		}
	}
	if got[1] != 100_000 || got[3] != 100_000 {
		t.Errorf("got %v", got)
	}
}

// The end of a body that fills the window to the last byte needs no window.
func TestEndNeedsNoWindow(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echo), nil)
	r := dialRaw(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 3})
	r.request(1, false, "POST", "/")
	r.data(1, false, "abc")
	for n := 0; n < 3; {
		if d, ok := r.next().(*xhttp2.DataFrame); ok {
			n += len(d.Data())
		}
	}
	r.head(1, true, "grpc-status: 0")
	if got := r.outcome(1); got.trailer != "grpc-status=0 " {
		t.Errorf("got %+v", got)
	}
}
