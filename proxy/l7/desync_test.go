package l7_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/l7"
)

// desync is a proxy that notes each request it lets pass, in front of net/http,
// which notes each request it sees.
type desync struct {
	proxy *proxy

	mu            sync.Mutex
	allowed, seen []string
}

func newDesync(tb testing.TB) *desync {
	tb.Helper()
	d := &desync{}
	upstream := serveHTTP(tb, func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		d.note(&d.seen, fmt.Sprintf("%s %s %s whole=%v", r.Method, r.Host, r.RequestURI, err == nil))
		w.WriteHeader(http.StatusNoContent)
	})
	d.proxy = start(tb, options{
		upstream: upstream,
		// A vector that is a proper beginning must not hold the test up.
		server: func(c *l7.ServerConfig) { c.HeadTimeout, c.StreamIdle = 200*time.Millisecond, 200*time.Millisecond },
		handler: func(p *proxy) l7.Handler {
			return handler(func(ex *l7.Exchange) l7.Response {
				target := string(ex.Request.Path)
				if ex.Request.HasQuery {
					target += "?" + string(ex.Request.RawQuery)
				}
				d.note(&d.allowed, fmt.Sprintf("%s %s %s", ex.Request.Method, ex.Request.Authority, target))
				return p.pool.Forward(ex)
			})
		},
	})
	return d
}

func (d *desync) note(list *[]string, line string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*list = append(*list, line)
}

// send sends a vector and a canary behind it, and reads to the end. It returns
// what was allowed and what the application saw.
func (d *desync) send(tb testing.TB, vector string) (allowed, seen []string) {
	tb.Helper()
	d.mu.Lock()
	d.allowed, d.seen = nil, nil
	d.mu.Unlock()
	c := connect(tb, d.proxy.addr)
	say(c.TCPConn, "%s", vector+"GET /canary HTTP/1.1\r\nHost: canary\r\nConnection: close\r\n\r\n")
	_ = c.CloseWrite()
	_, _ = io.Copy(io.Discard, c.r) // a reset is one of the ends
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.allowed, d.seen
}

// check requires that the application saw nothing but what was allowed, in
// order. A request whose body broke off may be missing.
func check(t *testing.T, vector string, allowed, seen []string) {
	t.Helper()
	i := 0
	for _, line := range seen {
		request, _, _ := strings.Cut(line, " whole=")
		for i < len(allowed) && allowed[i] != request {
			i++
		}
		if i == len(allowed) {
			t.Fatalf("%q: the application saw %q, allowed was only %q", vector, seen, allowed)
		}
		i++
	}
}

// vectors are the heads of the codec's corpus, and bodies that try to hide a
// request.
func vectors(tb testing.TB) []string {
	tb.Helper()
	f, err := os.Open(filepath.Join("..", "http1", "testdata", "requests.txt"))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	const hidden = "GET /hidden HTTP/1.1\r\nHost: hidden\r\n\r\n"
	list := []string{
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=\"\r\n\r\n\"\r\n" + hidden,
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc0\r\n\r\n" + hidden,
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 50\r\n\r\n" + hidden,
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\nX: y\n\n" + hidden,
		fmt.Sprintf("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(hidden), hidden),
		"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: content-length\r\n\r\n" + hidden,
		"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n\r\n0\r\n\r\n" + hidden,
		"GET /a HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n" + hidden,
		"GET /a HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\n" + hidden,
		"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + hidden,
	}
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		_, quoted, ok := strings.Cut(scanner.Text(), "\t")
		if !ok || strings.Contains(quoted, "{") {
			continue
		}
		s, err := strconv.Unquote(quoted)
		if err != nil {
			tb.Fatal(err)
		}
		list = append(list, s)
	}
	return list
}

func TestDesync(t *testing.T) {
	d := newDesync(t)
	for _, vector := range vectors(t) {
		allowed, seen := d.send(t, vector)
		check(t, vector, allowed, seen)
	}
	allowed, seen := d.send(t, "GET /first HTTP/1.1\r\nHost: a\r\n\r\n")
	want := []string{"GET a /first", "GET canary /canary"}
	if diff := cmp.Diff(want, allowed); diff != "" || len(seen) != 2 {
		t.Errorf("the oracle itself is blind: saw %q\n%s", seen, diff)
	}
}

func FuzzDesync(f *testing.F) {
	d := newDesync(f)
	for _, vector := range vectors(f) {
		f.Add(vector)
	}
	f.Fuzz(func(t *testing.T, vector string) {
		allowed, seen := d.send(t, vector)
		check(t, vector, allowed, seen)
	})
}
