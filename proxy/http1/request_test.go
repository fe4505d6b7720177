package http1_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/http1"
)

func outcome(err error) string {
	var refused *http1.Error
	switch {
	case err == nil:
		return "200"
	case errors.Is(err, http1.ErrShort):
		return "short"
	case errors.As(err, &refused):
		return strconv.Itoa(refused.Status)
	default:
		return err.Error()
	}
}

func defaults() *http1.Limits {
	l := http1.Limits{}.WithDefaults()
	return &l
}

func TestRequestCorpus(t *testing.T) {
	for _, row := range corpus(t, "requests.txt") {
		var r http1.Request
		n, err := r.Parse([]byte(row.in), defaults())
		if got := outcome(err); got != row.want {
			t.Errorf("line %d: %.80q: got %s (%v), want %s", row.line, row.in, got, err, row.want)
		}
		if err == nil && n != len(row.in) {
			t.Errorf("line %d: used %d of %d bytes", row.line, n, len(row.in))
		}
	}
}

// TestRequestByteByByte holds that a head means the same however it arrives.
func TestRequestByteByByte(t *testing.T) {
	for _, row := range corpus(t, "requests.txt") {
		if len(row.in) > 2000 {
			continue
		}
		var r http1.Request
		got := "short"
		for i := 0; i <= len(row.in) && got == "short"; i++ {
			_, err := r.Parse([]byte(row.in[:i]), defaults())
			got = outcome(err)
		}
		if got != row.want {
			t.Errorf("line %d: %.80q: got %s, want %s", row.line, row.in, got, row.want)
		}
	}
}

func TestFieldLimit(t *testing.T) {
	for _, tt := range []struct {
		fields int
		want   string
	}{{99, "200"}, {100, "431"}} {
		head := "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: y\r\n", tt.fields) + "\r\n"
		var r http1.Request
		_, err := r.Parse([]byte(head), defaults())
		if got := outcome(err); got != tt.want {
			t.Errorf("%d fields and Host: got %s, want %s", tt.fields, got, tt.want)
		}
	}
}

func TestUnderscoreAllowed(t *testing.T) {
	lim := http1.Limits{AllowUnderscore: true}.WithDefaults()
	var r http1.Request
	if _, err := r.Parse([]byte("GET / HTTP/1.1\r\nHost: a\r\nx_y: z\r\n\r\n"), &lim); err != nil {
		t.Error(err)
	}
}

// view is what a request means, in comparable form.
type view struct {
	Method, Path, Query, Host  string
	Length                     int64
	Chunked, KeepAlive, Expect bool
	WebSocket, HasQuery        bool
	EndToEnd                   []string
}

func viewOf(r *http1.Request) view {
	v := view{
		Method: string(r.Method), Path: string(r.Path), Query: string(r.RawQuery), Host: string(r.Host),
		Length: r.Length, Chunked: r.Chunked, KeepAlive: r.KeepAlive, Expect: r.ExpectContinue,
		WebSocket: r.WebSocket, HasQuery: r.HasQuery,
	}
	for _, f := range r.EndToEnd() {
		v.EndToEnd = append(v.EndToEnd, string(f.Name)+"="+string(f.Value))
	}
	return v
}

func TestRequestMeaning(t *testing.T) {
	for _, tt := range []struct {
		name, head string
		want       view
	}{
		{
			"plain", "GET /a?b=c HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n",
			view{Method: "GET", Path: "/a", Query: "b=c", HasQuery: true, Host: "x", KeepAlive: true, EndToEnd: []string{"Accept=*/*"}},
		},
		{
			"absolute without path", "GET http://X?q HTTP/1.1\r\nHost: x\r\n\r\n",
			view{Method: "GET", Path: "/", Query: "q", HasQuery: true, Host: "x", KeepAlive: true},
		},
		{
			"close", "GET / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n",
			view{Method: "GET", Path: "/", Host: "x"},
		},
		{
			"1.0 closes", "GET / HTTP/1.0\r\n\r\n",
			view{Method: "GET", Path: "/"},
		},
		{
			"1.0 keeps", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
			view{Method: "GET", Path: "/", KeepAlive: true},
		},
		{
			"hop by hop", "POST / HTTP/1.1\r\nA: 1\r\nConnection: x-secret, close\r\nHost: x\r\nTE: trailers\r\nX-Secret: s\r\nB: 2\r\n" +
				"Keep-Alive: 5\r\nProxy-Connection: k\r\nProxy-Authorization: p\r\nTrailer: t\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\nC: 3\r\n\r\n",
			view{Method: "POST", Path: "/", Host: "x", Chunked: true, Expect: true, EndToEnd: []string{"A=1", "B=2", "Trailer=t", "C=3"}},
		},
		{
			"connection lists connection", "GET / HTTP/1.1\r\nConnection: connection\r\nX-A: 1\r\nConnection: x-a\r\nHost: x\r\n\r\n",
			view{Method: "GET", Path: "/", Host: "x", KeepAlive: true},
		},
		{
			"websocket", "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: k\r\n\r\n",
			view{Method: "GET", Path: "/", Host: "x", KeepAlive: true, WebSocket: true, EndToEnd: []string{"Sec-WebSocket-Key=k"}},
		},
		{
			"expect without body", "GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
			view{Method: "GET", Path: "/", Host: "x", KeepAlive: true},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r http1.Request
			if _, err := r.Parse([]byte(tt.head), defaults()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, viewOf(&r)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestDripIsLinear feeds the largest head byte by byte: parsing it again from
// its start for each byte would take minutes.
func TestDripIsLinear(t *testing.T) {
	var b bytes.Buffer
	b.WriteString("GET / HTTP/1.1\r\nHost: a\r\n")
	for i := range 95 {
		fmt.Fprintf(&b, "X-%d: %s\r\n", i, strings.Repeat("v", 300))
	}
	b.WriteString("\r\n")
	head := b.Bytes()
	var r http1.Request
	calls := 0
	for i := range head {
		if _, err := r.Parse(head[:i], defaults()); !errors.Is(err, http1.ErrShort) {
			t.Fatalf("at %d: %v", i, err)
		}
		calls++
	}
	if _, err := r.Parse(head, defaults()); err != nil || len(r.Fields) != 96 {
		t.Fatalf("got %d fields, %v after %d calls", len(r.Fields), err, calls)
	}
}

// sameAsNetHTTP checks what is accepted here against net/http's reading of it.
func sameAsNetHTTP(t *testing.T, head []byte) {
	t.Helper()
	var r http1.Request
	n, err := r.Parse(head, defaults())
	if err != nil {
		return
	}
	std, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head[:n])))
	if err != nil {
		t.Fatalf("%q accepted, but net/http says %v", head[:n], err)
	}
	fields := 0
	for i := range r.Fields {
		switch r.Fields[i].ID {
		case http1.Host, http1.TransferEncoding, http1.Trailer:
		default:
			if !strings.EqualFold(string(r.Fields[i].Name), "Cache-Control") {
				fields++
			}
		}
	}
	stdFields := 0
	for name, values := range std.Header {
		if name != "Cache-Control" && name != "Trailer" {
			stdFields += len(values)
		}
	}
	type meaning struct {
		Method, Target, Host string
		Length               int64
		Fields               int
	}
	length := r.Length
	if r.Chunked {
		length = -1
	}
	got := meaning{string(r.Method), string(r.Target), strings.ToLower(string(r.Host)), length, fields}
	want := meaning{std.Method, std.RequestURI, strings.ToLower(std.Host), std.ContentLength, stdFields}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%q: (-net/http +ours)\n%s", head[:n], diff)
	}
}

func TestAgreesWithNetHTTP(t *testing.T) {
	for _, row := range corpus(t, "requests.txt") {
		sameAsNetHTTP(t, []byte(row.in))
	}
}

func FuzzRequest(f *testing.F) {
	for _, row := range corpus(f, "requests.txt") {
		f.Add([]byte(row.in))
	}
	f.Fuzz(func(t *testing.T, head []byte) { sameAsNetHTTP(t, head) })
}

func TestRequestDoesNotAllocate(t *testing.T) {
	head := []byte("GET /a/b?c=d HTTP/1.1\r\nHost: api.example:80\r\nUser-Agent: x\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nAccept: */*\r\n\r\n")
	var r http1.Request
	lim := defaults()
	out := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := r.Parse(head, lim); err != nil {
			t.Fatal(err)
		}
		out = http1.AppendRequestLine(out[:0], r.Method, r.Path, r.RawQuery, r.HasQuery)
		out = http1.AppendField(out, "Host", r.Host)
		out = http1.AppendFields(out, r.EndToEnd())
		out = append(out, http1.LineEnd...)
	}); n != 0 {
		t.Errorf("%v allocations per request, want 0", n)
	}
	const want = "GET /a/b?c=d HTTP/1.1\r\nHost: api.example:80\r\nUser-Agent: x\r\nAccept: */*\r\n\r\n"
	if string(out) != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func BenchmarkRequest(b *testing.B) {
	head := []byte("GET /a/b?c=d HTTP/1.1\r\nHost: api.example:80\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\nX-Request-Id: 4b1b8c1e-76ff-4d22-b1b0-111111111111\r\n\r\n")
	var r http1.Request
	lim := defaults()
	b.ReportAllocs()
	b.SetBytes(int64(len(head)))
	for b.Loop() {
		if _, err := r.Parse(head, lim); err != nil {
			b.Fatal(err)
		}
	}
}
