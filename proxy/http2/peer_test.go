package http2_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// rawPeer is an upstream's end of one HTTP/2 connection in the hands of a test.
type rawPeer struct {
	*xhttp2.Framer

	tb  testing.TB
	nc  net.Conn
	out bytes.Buffer
	enc *xhpack.Encoder
}

// serveFrames gives each connection to serve, after preface and SETTINGS of
// both sides, until serve returns.
func serveFrames(tb testing.TB, settings []xhttp2.Setting, serve func(p *rawPeer)) string {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = nc.Close() }() // the test may have closed it
				if p := newRawPeer(tb, nc, settings); p != nil {
					serve(p)
				}
			})
		}
	})
	tb.Cleanup(func() {
		if err := ln.Close(); err != nil {
			tb.Error(err)
		}
		wg.Wait()
	})
	return ln.Addr().String()
}

func newRawPeer(tb testing.TB, nc net.Conn, settings []xhttp2.Setting) *rawPeer {
	tb.Helper()
	_ = nc.SetDeadline(time.Now().Add(30 * time.Second))
	preface := make([]byte, len(xhttp2.ClientPreface))
	if _, err := io.ReadFull(nc, preface); err != nil || string(preface) != xhttp2.ClientPreface {
		return nil
	}
	p := &rawPeer{Framer: xhttp2.NewFramer(nc, nc), tb: tb, nc: nc}
	p.ReadMetaHeaders = xhpack.NewDecoder(4096, nil)
	p.enc = xhpack.NewEncoder(&p.out)
	if p.WriteSettings(settings...) != nil {
		return nil
	}
	return p
}

// next returns the next frame of one of the kinds, answering SETTINGS, and PING
// unless it is asked for. nil is the connection's end.
func (p *rawPeer) next(kinds ...xhttp2.FrameType) xhttp2.Frame {
	for {
		f, err := p.ReadFrame()
		if err != nil {
			return nil
		}
		for _, k := range kinds {
			if f.Header().Type == k {
				return f
			}
		}
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = p.WriteSettingsAck()
			}
		case *xhttp2.PingFrame:
			if !f.IsAck() {
				_ = p.WritePing(true, f.Data)
			}
		}
	}
}

// request returns the next request's head.
func (p *rawPeer) request() *xhttp2.MetaHeadersFrame {
	f, _ := p.next(xhttp2.FrameHeaders).(*xhttp2.MetaHeadersFrame)
	return f
}

// block encodes "name: value" lines.
func (p *rawPeer) block(lines ...string) []byte {
	p.out.Reset()
	for _, line := range lines {
		colon := strings.Index(line[1:], ":") + 1
		if err := p.enc.WriteField(xhpack.HeaderField{Name: line[:colon], Value: strings.TrimPrefix(line[colon+1:], " ")}); err != nil {
			p.tb.Error(err)
		}
	}
	return bytes.Clone(p.out.Bytes())
}

// head sends a HEADERS frame.
func (p *rawPeer) head(id uint32, end bool, lines ...string) {
	_ = p.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(lines...), EndHeaders: true, EndStream: end})
}

// answer sends a whole response.
func (p *rawPeer) answer(id uint32, body string) {
	p.head(id, false, ":status: 200", "content-type: text/plain")
	_ = p.WriteData(id, true, []byte(body))
}

// goAway returns the error code of the GOAWAY that ends the connection, or
// NoError if it ends without.
func (p *rawPeer) goAway() xhttp2.ErrCode {
	if f, ok := p.next(xhttp2.FrameGoAway).(*xhttp2.GoAwayFrame); ok {
		return f.ErrCode
	}
	return xhttp2.ErrCodeNo
}

// dialTo returns a Dial for a pool.
func dialTo(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}

// got is a response as its consumer saw it.
type got struct {
	Status   int
	Interim  []int
	Fields   map[string]string
	Length   int64
	NoBody   bool
	Body     string
	Trailers map[string]string
	Reason   l7.Reason
	Detail   string
}

// newExchange returns a request without a body: "GET /path", or with one.
func newExchange(request string, body l7.Body, fields ...string) *l7.Exchange {
	method, path, _ := strings.Cut(request, " ")
	ex := &l7.Exchange{
		Request: l7.Head{
			Method: []byte(method), Scheme: []byte("http"), Authority: []byte("app.example"), Path: []byte(path), Length: -1,
		},
		Body: body, Conn: &l7.ConnInfo{},
	}
	if path, query, ok := strings.Cut(path, "?"); ok {
		ex.Request.Path, ex.Request.RawQuery, ex.Request.HasQuery = []byte(path), []byte(query), true
	}
	if body == nil {
		ex.Request.Length = 0
	}
	for _, line := range fields {
		name, value, _ := strings.Cut(line, ": ")
		ex.Request.Fields.Add([]byte(name), []byte(value))
	}
	return ex
}

// bell is a Waker that a goroutine can wait for.
type bell chan struct{}

func (b bell) Wake() {
	select {
	case b <- struct{}{}:
	default:
	}
}

// pull consumes a response to its end, blocking in its calls, or waiting for a
// Waker as a connection's writer does.
func pull(resp l7.Response, active bool) (g got) {
	defer resp.Close()
	var w l7.Waker
	rang := make(bell, 1)
	if active {
		w = rang
	}
	failed := func(err error) bool {
		if errors.Is(err, l7.ErrPending) && active {
			<-rang
			return false
		}
		if e, ok := errors.AsType[*l7.Error](err); ok {
			g.Reason, g.Detail = e.Reason, e.Detail
			return true
		}
		g.Reason, g.Detail = l7.Internal, "not an *Error: "+err.Error()
		return true
	}
	for g.Status == 0 {
		h, err := resp.Head(w)
		switch {
		case err != nil:
			if failed(err) {
				return g
			}
		case h.Status < 200 && h.Status != 101:
			g.Interim = append(g.Interim, h.Status)
		default:
			g.Status, g.Length, g.NoBody = h.Status, h.Length, h.NoBody
			g.Fields = map[string]string{}
			for i := range h.Fields {
				g.Fields[string(h.Fields[i].Name)] += string(h.Fields[i].Value)
			}
		}
	}
	var body strings.Builder
	defer func() { g.Body = body.String() }()
	for !g.NoBody {
		view, err := resp.Next(16<<10, w)
		body.Write(view)
		if err == io.EOF { //nolint:errorlint // by contract as it is
			break
		}
		if err != nil && failed(err) {
			return g
		}
	}
	for _, f := range resp.Trailers() {
		if g.Trailers == nil {
			g.Trailers = map[string]string{}
		}
		g.Trailers[string(f.Name)] += string(f.Value)
	}
	return g
}

// textBody is a request's body that is there at once, a part at a time.
type textBody struct {
	parts    []string
	trailers []string
	fail     *l7.Error // instead of the end

	mu        sync.Mutex
	pulled    int
	cancelled l7.Reason
}

func (b *textBody) Next(limit int, _ l7.Waker) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.parts) == 0 {
		if b.fail != nil {
			return nil, b.fail
		}
		return nil, io.EOF
	}
	n := min(limit, len(b.parts[0]))
	view := []byte(b.parts[0][:n])
	if b.parts[0] = b.parts[0][n:]; b.parts[0] == "" {
		b.parts = b.parts[1:]
	}
	b.pulled += n
	return view, nil
}

func (b *textBody) Trailers() (f http1.Fields) {
	for _, line := range b.trailers {
		name, value, _ := strings.Cut(line, ": ")
		f.Add([]byte(name), []byte(value))
	}
	return f
}

func (b *textBody) Cancel(r l7.Reason) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cancelled = r
}

func (*textBody) Blocking() bool { return false }

// seen returns how much of the body was pulled, and why it was cancelled.
func (b *textBody) seen() (int, l7.Reason) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pulled, b.cancelled
}
