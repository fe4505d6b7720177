package http2_test

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// newPool returns a pool that is closed when the test ends.
func newPool(tb testing.TB, addr string, change func(*http2.PoolConfig)) *http2.Pool {
	tb.Helper()
	cfg := http2.PoolConfig{Dial: dialTo(addr)}
	if change != nil {
		change(&cfg)
	}
	p := http2.NewPool(cfg)
	tb.Cleanup(p.CloseIdle)
	return p
}

// What an upstream answers, and what its consumer sees of it.
func TestResponses(t *testing.T) {
	t.Parallel()
	ok := func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200") }
	for name, c := range map[string]struct {
		request string
		answer  func(p *rawPeer, id uint32)
		want    got
		ends    xhttp2.ErrCode // of the connection, by our GOAWAY
		reset   bool           // of the stream, by us
	}{
		"head alone": {
			answer: ok,
			want:   got{Status: 200, Fields: map[string]string{}},
		},
		"body and trailers": {
			answer: func(p *rawPeer, id uint32) {
				p.head(id, false, ":status: 200", "content-type: a/b", "content-length: 6", "x_y: 1")
				_ = p.WriteData(id, false, []byte("abc"))
				_ = p.WriteDataPadded(id, false, []byte("def"), make([]byte, 9))
				p.head(id, true, "grpc-status: 0", "content-length: 7", "authorization: x")
			},
			want: got{
				Status: 200, Length: 6, Body: "abcdef",
				Fields: map[string]string{"content-type": "a/b", "x_y": "1"}, Trailers: map[string]string{"grpc-status": "0"},
			},
		},
		"interim heads": {
			answer: func(p *rawPeer, id uint32) {
				p.head(id, false, ":status: 100")
				p.head(id, false, ":status: 103", "link: </a>")
				p.answer(id, "x")
			},
			want: got{Status: 200, Interim: []int{100, 103}, Length: -1, Body: "x", Fields: map[string]string{"content-type": "text/plain"}},
		},
		"HEAD": {
			request: "HEAD /",
			answer:  func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "content-length: 1000") },
			want:    got{Status: 200, Length: 1000, NoBody: true, Fields: map[string]string{}},
		},
		"HEAD whose end comes later": {
			request: "HEAD /",
			answer: func(p *rawPeer, id uint32) {
				p.head(id, false, ":status: 200", "content-length: 1000")
				_ = p.WriteData(id, true, nil)
			},
			want: got{Status: 200, Length: 1000, NoBody: true, Fields: map[string]string{}},
		},
		"204": {
			answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 204") },
			want:   got{Status: 204, Length: -1, NoBody: true, Fields: map[string]string{}},
		},
		"304": {
			answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 304", "content-length: 5", "etag: 1") },
			want:   got{Status: 304, Length: 5, NoBody: true, Fields: map[string]string{"etag": "1"}},
		},
		"hop-by-hop fields of an answer": {
			answer: func(p *rawPeer, id uint32) {
				p.head(id, true, ":status: 401", "proxy-authenticate: Basic", "te: trailers", "a: b")
			},
			want: got{Status: 401, Fields: map[string]string{"a": "b"}},
		},
		"no status":          {answer: func(p *rawPeer, id uint32) { p.head(id, true, "a: b") }, want: refused, reset: true},
		"status twice":       {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", ":status: 200") }, want: refused, reset: true},
		"status behind":      {answer: func(p *rawPeer, id uint32) { p.head(id, true, "a: b", ":status: 200") }, want: refused, reset: true},
		"status of a word":   {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 2OO") }, want: refused, reset: true},
		"status 101":         {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 101") }, want: refused, reset: true},
		"a request's pseudo": {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", ":path: /") }, want: refused, reset: true},
		"upper case":         {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "A: b") }, want: refused, reset: true},
		"a line break":       {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "a: b\r\nc: d") }, want: refused, reset: true},
		"connection: close":  {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "connection: close") }, want: refused, reset: true},
		"transfer-encoding":  {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "transfer-encoding: chunked") }, want: refused, reset: true},
		"two content-lengths": {answer: func(p *rawPeer, id uint32) {
			p.head(id, true, ":status: 200", "content-length: 0", "content-length: 0")
		}, want: refused, reset: true},
		"content-length +1": {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "content-length: +1") }, want: refused, reset: true},
		"interim that ends": {answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 103") }, want: refused, reset: true},
		"a large head": {
			answer: func(p *rawPeer, id uint32) {
				b := p.block(":status: 200", "a: "+strings.Repeat("~", 15<<10), "b: "+strings.Repeat("~", 17<<10))
				_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: b[:16000], EndStream: true})
				_ = p.WriteContinuation(id, false, b[16000:32000])
				_ = p.WriteContinuation(id, true, b[32000:])
			},
			want: refused, reset: true,
		},
		"interim heads without end": {
			answer: func(p *rawPeer, id uint32) {
				for range 100 {
					p.head(id, false, ":status: 103")
				}
			},
			want: refused, reset: true,
		},
		"less than declared": {
			answer: func(p *rawPeer, id uint32) { p.head(id, true, ":status: 200", "content-length: 1") },
			want:   refused, reset: true,
		},
		"data before the head": {
			answer: func(p *rawPeer, id uint32) { _ = p.WriteData(id, true, []byte("x")) },
			want:   refused, reset: true,
		},
		"data with 204": {
			answer: func(p *rawPeer, id uint32) {
				p.head(id, false, ":status: 204")
				_ = p.WriteData(id, true, []byte("x"))
			},
			want: got{Status: 204, Length: -1, NoBody: true, Fields: map[string]string{}}, reset: true,
		},
		"reset": {
			answer: func(p *rawPeer, id uint32) { _ = p.WriteRSTStream(id, xhttp2.ErrCodeInternal) },
			want:   got{Reason: l7.UpstreamReset},
		},
		"a block that cannot be decoded": {
			answer: func(p *rawPeer, id uint32) {
				_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0x80}, EndHeaders: true})
			},
			want: got{Reason: l7.UpstreamProtocol}, ends: xhttp2.ErrCodeCompression,
		},
		"a stream that we never opened": {
			answer: func(p *rawPeer, id uint32) { p.head(id+2, true, ":status: 200") },
			want:   got{Reason: l7.UpstreamProtocol}, ends: xhttp2.ErrCodeProtocol,
		},
		"a push": {
			answer: func(p *rawPeer, id uint32) {
				_ = p.WritePushPromise(xhttp2.PushPromiseParam{StreamID: id, PromiseID: 2, BlockFragment: p.block(":method: GET"), EndHeaders: true})
			},
			want: got{Reason: l7.UpstreamProtocol}, ends: xhttp2.ErrCodeProtocol,
		},
		"a frame that is too large": {
			answer: func(p *rawPeer, id uint32) {
				p.head(id, false, ":status: 200")
				_ = p.WriteRawFrame(xhttp2.FrameData, 0, id, make([]byte, 1<<20))
			},
			want: got{Status: 200, Length: -1, Fields: map[string]string{}, Reason: l7.UpstreamProtocol}, ends: xhttp2.ErrCodeFrameSize,
		},
	} {
		for _, active := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", active ", active), func(t *testing.T) {
				t.Parallel()
				request := c.request
				if request == "" {
					request = "GET /"
				}
				addr := serveFrames(t, nil, func(p *rawPeer) {
					r := p.request()
					if r == nil {
						return
					}
					c.answer(p, r.StreamID)
					switch {
					case c.reset:
						if f, ok := p.next(xhttp2.FrameRSTStream, xhttp2.FrameGoAway).(*xhttp2.RSTStreamFrame); !ok || f.ErrCode != xhttp2.ErrCodeProtocol && f.ErrCode != xhttp2.ErrCodeCancel {
							t.Errorf("got %v, want RST_STREAM", f)
						}
					case c.ends != 0:
						if code := p.goAway(); code != c.ends {
							t.Errorf("got GOAWAY %v, want %v", code, c.ends)
						}
						return
					}
					// The connection still serves.
					if r := p.request(); r != nil {
						p.answer(r.StreamID, "again")
						p.next(xhttp2.FrameGoAway)
					}
				})
				pool := newPool(t, addr, nil)
				g := pull(pool.Forward(newExchange(request, nil)), active)
				want := c.want
				if g.Detail = ""; want.Reason != l7.None {
					g.Interim = nil // how many were taken before is a matter of luck
				}
				if diff := cmp.Diff(want, g); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if c.ends == 0 {
					if g := pull(pool.Forward(newExchange("GET /again", nil)), active); g.Body != "again" {
						t.Errorf("the next exchange: %+v", g)
					}
				}
			})
		}
	}
}

//nolint:gochecknoglobals // a constant
var refused = got{Reason: l7.UpstreamProtocol}

// What is sent of a request.
func TestRequests(t *testing.T) {
	t.Parallel()
	heads := make(chan []string, 1)
	bodies := make(chan string, 1)
	addr := serveFrames(t, nil, func(p *rawPeer) {
		for {
			r := p.request()
			if r == nil {
				return
			}
			var lines []string
			for _, f := range r.Fields {
				line := f.Name + ": " + f.Value
				if f.Sensitive {
					line += " (never indexed)"
				}
				lines = append(lines, line)
			}
			var body bytes.Buffer
			for ended := r.StreamEnded(); !ended; {
				switch f := p.next(xhttp2.FrameData, xhttp2.FrameHeaders).(type) {
				case *xhttp2.DataFrame:
					body.Write(f.Data())
					ended = f.StreamEnded()
				case *xhttp2.MetaHeadersFrame:
					for _, f := range f.Fields {
						body.WriteString("|" + f.Name + ": " + f.Value)
					}
					ended = f.StreamEnded()
				default:
					return
				}
			}
			heads <- lines
			bodies <- body.String()
			p.answer(r.StreamID, "")
		}
	})
	pool := newPool(t, addr, nil)
	const front, rest = ":method: ", ":scheme: http|:authority: app.example|:path: "
	sized := newExchange("POST /", &textBody{parts: []string{"abc", "def"}})
	sized.Request.Length = 6
	waits := newExchange("PUT /", &textBody{parts: []string{"abc"}})
	waits.ExpectContinue = true
	for _, c := range []struct {
		ex   *l7.Exchange
		head string
		body string
	}{
		{newExchange("GET /a?b=c", nil, "User-Agent: x", "X-Y: Z"), "GET|" + rest + "/a?b=c|user-agent: x|x-y: Z", ""},
		{newExchange("GET /a?", nil), "GET|" + rest + "/a?", ""},
		{newExchange("OPTIONS *", nil), "OPTIONS|" + rest + "*", ""},
		{newExchange("POST /", nil), "POST|" + rest + "/|content-length: 0", ""},
		{sized, "POST|" + rest + "/|content-length: 6", "abcdef"},
		{waits, "PUT|" + rest + "/|expect: 100-continue", "abc"},
		{newExchange("POST /", &textBody{parts: []string{"abc"}, trailers: []string{"X-Sum: 1", "Host: no"}}), "POST|" + rest + "/", "abc|x-sum: 1"},
		{newExchange("POST /", &textBody{}), "POST|" + rest + "/", ""},
		{newExchange("GET /", nil, "Authorization: Bearer x", "TE: trailers"), "GET|" + rest + "/|authorization: Bearer x (never indexed)|te: trailers", ""},
		{newExchange("POST /p.S/M", nil, "Content-Type: application/grpc+proto"), "POST|" + rest + "/p.S/M|content-type: application/grpc+proto|te: trailers|content-length: 0", ""},
	} {
		g := pull(pool.Forward(c.ex), true)
		if g.Status != 200 {
			t.Fatalf("%+v", g)
		}
		if diff := cmp.Diff(strings.Split(front+c.head, "|"), <-heads); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if body := <-bodies; body != c.body {
			t.Errorf("%s: body %q, want %q", c.head, body, c.body)
		}
	}
}

// Streams that the peer says it did not process are sent again elsewhere.
func TestSentAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refuse  func(p *rawPeer, id uint32)
		request string
		body    bool
		again   bool
	}{
		"refused stream":              {func(p *rawPeer, id uint32) { _ = p.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream) }, "POST /", false, true},
		"refused stream, with a body": {func(p *rawPeer, id uint32) { _ = p.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream) }, "POST /", true, true},
		"GOAWAY below it":             {func(p *rawPeer, id uint32) { _ = p.WriteGoAway(id-2, xhttp2.ErrCodeNo, nil) }, "POST /", false, true},
		"reset by GOAWAY's peer":      {func(p *rawPeer, id uint32) { _ = p.WriteGoAway(id, xhttp2.ErrCodeInternal, nil); _ = p.nc.Close() }, "POST /", false, false},
		"kept connection dies, GET":   {func(p *rawPeer, _ uint32) { _ = p.nc.Close() }, "GET /", false, true},
		"kept connection dies, POST":  {func(p *rawPeer, _ uint32) { _ = p.nc.Close() }, "POST /", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			requests := 0
			addr := serveFrames(t, nil, func(p *rawPeer) {
				for {
					r := p.request()
					if r == nil {
						return
					}
					mu.Lock()
					requests++
					n := requests
					mu.Unlock()
					if n == 2 {
						if c.body {
							p.next(xhttp2.FrameData)
						}
						c.refuse(p, r.StreamID)
						continue
					}
					p.answer(r.StreamID, "ok")
				}
			})
			pool := newPool(t, addr, nil)
			if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Body != "ok" {
				t.Fatalf("the first: %+v", g)
			}
			ex := newExchange(c.request, nil)
			if c.body {
				ex = newExchange(c.request, &textBody{parts: []string{"abc"}})
			}
			g := pull(pool.Forward(ex), false)
			if c.again && (g.Body != "ok" || !ex.Record.Retried) || !c.again && (g.Reason != l7.UpstreamReset || ex.Record.Retried) {
				t.Errorf("got %+v, retried %v", g, ex.Record.Retried)
			}
		})
	}
}
