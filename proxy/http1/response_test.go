package http1_test

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/http1"
)

type answer struct {
	Status    int
	Reason    string
	Framing   http1.Framing
	Length    int64
	KeepAlive bool
	EndToEnd  string
}

func TestResponse(t *testing.T) {
	for _, tt := range []struct {
		name, method, head string
		want               answer
	}{
		{"sized", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", answer{200, "OK", http1.Sized, 3, true, ""}},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n", answer{200, "OK", http1.Chunked, -1, true, "A"}},
		{"until close", "GET", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", answer{200, "OK", http1.UntilClose, -1, false, ""}},
		{"1.0", "GET", "HTTP/1.0 200 OK\r\n\r\n", answer{200, "OK", http1.UntilClose, -1, false, ""}},
		{"head", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", answer{200, "OK", http1.NoBody, 3, true, ""}},
		{"head chunked", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", answer{200, "OK", http1.NoBody, -1, true, ""}},
		{"204", "GET", "HTTP/1.1 204 No Content\r\n\r\n", answer{204, "No Content", http1.NoBody, -1, true, ""}},
		{"304", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", answer{304, "Not Modified", http1.NoBody, 9, true, ""}},
		{"100", "POST", "HTTP/1.1 100 Continue\r\n\r\n", answer{100, "Continue", http1.NoBody, -1, true, ""}},
		{"no reason, no space", "GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", answer{200, "", http1.Sized, 0, true, ""}},
		{"underscore", "GET", "HTTP/1.1 200 \r\nContent-Length: 0\r\nx_y: z\r\n\r\n", answer{200, "", http1.Sized, 0, true, "x_y"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r http1.Response
			n, err := r.Parse([]byte(tt.head), defaults())
			if err != nil || n != len(tt.head) {
				t.Fatal(n, err)
			}
			var names []string
			framing := r.BodyFor([]byte(tt.method))
			for _, f := range r.EndToEnd() {
				names = append(names, string(f.Name))
			}
			got := answer{r.Status, string(r.Reason), framing, r.Length, r.KeepAlive, strings.Join(names, ",")}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestResponseRefused(t *testing.T) {
	for _, head := range []string{
		"HTTP/1.1 200 OK\nContent-Length: 3\n\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 03\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
		"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX: a\x00\r\n\r\n",
		"HTTP/1.1 200 O\x01K\r\n\r\n",
		"HTTP/1.1 2OO OK\r\n\r\n",
		"HTTP/1.1 20 OK\r\n\r\n",
		"HTTP/1.1 099 OK\r\n\r\n",
		"HTTP/1.1 2000 OK\r\n\r\n",
		"HTTP/1.1  200 OK\r\n\r\n",
		"HTTP/2.0 200 OK\r\n\r\n",
		"HTTP/1.2 200 OK\r\n\r\n",
		"ICY 200 OK long enough\r\n\r\n",
		"\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("a", 9000),
	} {
		var r http1.Response
		if _, err := r.Parse([]byte(head), defaults()); outcome(err) != "502" {
			t.Errorf("%.60q: got %s (%v), want 502", head, outcome(err), err)
		}
	}
}

func TestResponseDoesNotAllocate(t *testing.T) {
	head := []byte("HTTP/1.1 200 OK\r\nServer: x\r\nDate: now\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\n")
	var r http1.Response
	lim := defaults()
	out := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := r.Parse(head, lim); err != nil {
			t.Fatal(err)
		}
		out = http1.AppendStatusLine(out[:0], r.Status, r.Reason)
		out = http1.AppendFields(out, r.EndToEnd())
		out = http1.AppendLength(out, r.Length)
		out = append(out, http1.LineEnd...)
	}); n != 0 {
		t.Errorf("%v allocations per response, want 0", n)
	}
	const want = "HTTP/1.1 200 OK\r\nServer: x\r\nDate: now\r\nContent-Length: 3\r\n\r\n"
	if string(out) != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// FuzzResponse holds that what is accepted here, net/http accepts with the
// same status and framing.
func FuzzResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n"), true)
	f.Add([]byte("HTTP/1.0 304 x\r\nConnection: keep-alive\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, head []byte, isHead bool) {
		method := "GET"
		if isHead {
			method = "HEAD"
		}
		var r http1.Response
		n, err := r.Parse(head, defaults())
		if err != nil {
			return
		}
		std, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head[:n])), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%q accepted, but net/http says %v", head[:n], err)
		}
		defer func() { _ = std.Body.Close() }() // nothing of it is read
		want := r.Length
		switch r.BodyFor([]byte(method)) {
		case http1.NoBody:
			return
		case http1.Chunked, http1.UntilClose:
			want = -1
		case http1.Sized:
		}
		if std.StatusCode != r.Status || std.ContentLength != want {
			t.Fatalf("%q: got %d with length %d, net/http says %d with length %d", head[:n], r.Status, want, std.StatusCode, std.ContentLength)
		}
	})
}
