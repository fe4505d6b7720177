package http2_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// apart are fields that an end makes or takes away, or that net/http does not
// show as they came.
//
//nolint:gochecknoglobals // a constant
var apart = []string{"sec-websocket-key", "trailer", "pragma", "cache-control", "content-length", "upgrade", "connection", "expect"}

// seen is a request's head as policy was shown it: one line per fact.
func seen(ex *l7.Exchange) []string {
	h := &ex.Request
	target := string(h.Path)
	if h.HasQuery {
		target += "?" + string(h.RawQuery)
	}
	length := h.Length
	if ex.Upgrade != "" {
		length = 0 // what follows is no body
	}
	lines := []string{fmt.Sprintf("%s %s %s %d %q", h.Method, h.Authority, target, length, ex.Upgrade)}
	for i := range h.Fields {
		f := &h.Fields[i]
		if name := strings.ToLower(string(f.Name)); f.ID != http1.TE && !slices.Contains(apart, name) {
			lines = append(lines, name+": "+string(f.Value))
		}
	}
	slices.Sort(lines[1:])
	return lines
}

// piped gives the two ends of a connection in memory, with a deadline.
func piped() (net.Conn, net.Conn) {
	a, b := net.Pipe()
	by := time.Now().Add(10 * time.Second)
	_, _ = a.SetDeadline(by), b.SetDeadline(by) // pipes have deadlines
	return a, b
}

// FuzzTranslateUp holds that what a request over HTTP/1 was when it was decided
// about is what arrives over HTTP/2.
func FuzzTranslateUp(f *testing.F) {
	for _, s := range []string{
		"GET /a/../b?x=1 HTTP/1.1\r\nHost: A.example:80\r\nX-Y: z\r\nx-y: Z\r\nCookie: a=b\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
		"POST /?# HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n",
		"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, x\r\nUpgrade: websocket\r\nX: :path\r\nSec-WebSocket-Key: a\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: [::1]\r\nTE: trailers\r\nConnection: TE\r\nAuthorization: b\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	arrived := make(chan []string, 64)
	far := http2.NewServer(http2.ServerConfig{ServerConfig: l7.ServerConfig{Handler: handler(func(ex *l7.Exchange) l7.Response {
		arrived <- seen(ex)
		return text("ok")
	})}})
	pool := http2.NewPool(http2.PoolConfig{Dial: func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		go func() { _ = far.NewConn(b, l7.ConnInfo{}).Serve(context.Background()) }() //nolint:contextcheck // ends with the pool, not with its dial
		return a, nil
	}})
	f.Cleanup(pool.CloseIdle)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var decided [][]string
		near := l7.NewServer(l7.ServerConfig{Handler: handler(func(ex *l7.Exchange) l7.Response {
			decided = append(decided, seen(ex))
			return pool.Forward(ex)
		})})
		a, b := piped()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = near.NewConn(b, l7.ConnInfo{}).Serve(context.Background()) // what it refuses is its own tests' concern
		}()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		_, _ = a.Write(raw) // it may end before all is written
		_ = a.Close()
		<-done
		var got [][]string
		for len(arrived) > 0 {
			got = append(got, <-arrived)
		}
		for _, g := range got {
			if !slices.ContainsFunc(decided, func(d []string) bool { return slices.Equal(d, g) }) {
				t.Errorf("arrived:\n%q\ndecided about:\n%q", g, decided)
			}
		}
	})
}

// FuzzTranslateDown holds that what a request over HTTP/2 was when it was decided
// about is what net/http reads behind a connection of HTTP/1, and nothing else.
func FuzzTranslateDown(f *testing.F) {
	for _, s := range []string{
		":method\x00GET\x00:scheme\x00http\x00:authority\x00a\x00:path\x00/a?b\x00x-y\x00z\x00cookie\x00a=b\x00cookie\x00c=d",
		":method\x00POST\x00:scheme\x00http\x00:authority\x00a\x00:path\x00/\x00content-length\x003\x00x\x00a\r\nb: c",
		":method\x00GET\x00:scheme\x00http\x00:path\x00/\x00host\x00b\x00te\x00trailers",
		":method\x00GET /x HTTP/1.1\x00:scheme\x00http\x00:authority\x00a\x00:path\x00/",
		":method\x00GET\x00:scheme\x00http\x00:authority\x00a\x00:path\x00/ HTTP/1.1\r\nX: y",
		":method\x00GET\x00:scheme\x00http\x00:authority\x00a b\x00:path\x00/\x00transfer-encoding\x00chunked\x00x:\x00y",
	} {
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, list []byte, end bool) {
		var decided []string
		read := make(chan []string, 1)
		pool := l7.NewPool(l7.PoolConfig{Dial: func(context.Context) (net.Conn, error) {
			a, b := piped()
			go func() {
				defer func() { _ = b.Close() }() // one answer
				read <- overOne(b)
			}()
			return a, nil
		}})
		srv := http2.NewServer(http2.ServerConfig{ServerConfig: l7.ServerConfig{Handler: handler(func(ex *l7.Exchange) l7.Response {
			decided = seen(ex)
			return pool.Forward(ex)
		})}})
		a, b := piped()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = srv.NewConn(b, l7.ConnInfo{}).Serve(context.Background()) // what it refuses is its own tests' concern
		}()
		answered := make(chan struct{})
		fr := xhttp2.NewFramer(a, a)
		go func() { // until the request is answered
			defer close(answered)
			for {
				h, err := fr.ReadFrame()
				if err != nil || h.Header().StreamID == 1 && (h.Header().Flags.Has(xhttp2.FlagDataEndStream) || h.Header().Type == xhttp2.FrameRSTStream) {
					return
				}
			}
		}()
		var block bytes.Buffer
		enc := xhpack.NewEncoder(&block)
		for parts := strings.Split(string(list), "\x00"); len(parts) > 1; parts = parts[2:] {
			_ = enc.WriteField(xhpack.HeaderField{Name: parts[0], Value: parts[1]}) // into memory
		}
		_, _ = io.WriteString(a, xhttp2.ClientPreface) // it may end at any time
		_ = fr.WriteSettings()
		_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes()[:min(block.Len(), 16000)], EndStream: end, EndHeaders: true})
		if !end {
			_ = fr.WriteData(1, true, []byte("abc"))
		}
		<-answered
		_ = a.Close()
		<-done
		select {
		case got := <-read:
			if !slices.Equal(got, decided) && got[0] != "broke off" {
				t.Errorf("net/http read:\n%q\ndecided about:\n%q", got, decided)
			}
		default:
		}
	})
}

// overOne reads one request with net/http, tells it as seen does, and answers.
func overOne(nc net.Conn) []string {
	r := bufio.NewReader(nc)
	req, err := http.ReadRequest(r)
	if err != nil {
		return []string{"net/http: " + err.Error()}
	}
	if _, err := io.Copy(io.Discard, req.Body); err != nil {
		return []string{"broke off"}
	}
	lines := []string{fmt.Sprintf("%s %s %s %d %q", req.Method, req.Host, req.RequestURI, req.ContentLength, req.Header.Get("Upgrade"))}
	for name, values := range req.Header {
		name = strings.ToLower(name)
		if slices.Contains(apart, name) {
			continue
		}
		for _, v := range values {
			lines = append(lines, name+": "+v)
		}
	}
	slices.Sort(lines[1:])
	_, _ = io.WriteString(nc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok") // it may be gone
	if n := r.Buffered(); n > 0 {
		return append(lines, fmt.Sprint(n, " bytes behind the request"))
	}
	return lines
}
