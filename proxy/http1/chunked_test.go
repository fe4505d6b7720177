package http1_test

import (
	"bytes"
	"errors"
	"io"
	"net/http/httputil"
	"strings"
	"testing"

	"github.com/meshd/meshd/proxy/http1"
)

// decode runs in through the decoder in pieces of the given size, as a
// connection does: what was not used stays in front of what comes next.
func decode(in string, piece int) (data string, rest string, trailers http1.Fields, err error) {
	var d http1.ChunkDecoder
	var buf []byte
	var out strings.Builder
	for {
		view, used, err := d.Decode(buf, defaults())
		out.Write(view)
		if err != nil {
			return out.String(), string(buf[used:]) + in, d.Trailers(), err
		}
		buf = append([]byte(nil), buf[used:]...)
		if len(in) == 0 {
			return out.String(), string(buf), nil, http1.ErrShort
		}
		n := min(piece, len(in))
		buf = append(buf, in[:n]...)
		in = in[n:]
	}
}

func TestChunkedCorpus(t *testing.T) {
	for _, row := range corpus(t, "chunked.txt") {
		for _, piece := range []int{1, 2, 3, 7, 1 << 20} {
			data, rest, _, err := decode(row.in, piece)
			got := outcome(err)
			if errors.Is(err, io.EOF) {
				got = "ok"
			}
			if got != row.want {
				t.Errorf("line %d, pieces of %d: %.60q: got %s (%v), want %s", row.line, piece, row.in, got, err, row.want)
			}
			if got == "ok" && (data != row.data || rest != "") {
				t.Errorf("line %d, pieces of %d: got data %q and rest %q, want %q", row.line, piece, data, rest, row.data)
			}
		}
	}
}

func TestChunkedLeavesWhatFollows(t *testing.T) {
	const next = "GET / HTTP/1.1\r\n"
	data, rest, trailers, err := decode("3\r\nabc\r\n0\r\nX-Sum: 7\r\nHost: evil\r\nMesh-Error: x\r\n\r\n"+next, 1<<20)
	if data != "abc" || rest != next || !errors.Is(err, io.EOF) {
		t.Errorf("got %q, rest %q, %v", data, rest, err)
	}
	if len(trailers) != 1 || string(trailers[0].Name) != "X-Sum" || string(trailers[0].Value) != "7" {
		t.Errorf("got trailers %v, want X-Sum only", trailers)
	}
}

func TestChunkExtensionsAreBounded(t *testing.T) {
	one := "1;" + strings.Repeat("x", 200) + "\r\na\r\n"
	_, _, _, err := decode(strings.Repeat(one, 30)+"0\r\n\r\n", 1<<20)
	if got := outcome(err); got != "400" {
		t.Errorf("30 chunks with 200 bytes of extension each: got %s, want 400", got)
	}
}

func TestChunkedDoesNotAllocate(t *testing.T) {
	var d http1.ChunkDecoder
	lim := defaults()
	const body = "5\r\nhello\r\n6\r\n world\r\n0\r\nX: y\r\n\r\n"
	buf := make([]byte, len(body))
	if n := testing.AllocsPerRun(1000, func() {
		copy(buf, body)
		d.Reset()
		if data, _, err := d.Decode(buf, lim); !errors.Is(err, io.EOF) || string(data) != "hello world" {
			t.Fatal(string(data), err)
		}
	}); n != 0 {
		t.Errorf("%v allocations per body, want 0", n)
	}
}

func TestLastChunkDropsForbiddenTrailers(t *testing.T) {
	var f http1.Fields
	f.Add([]byte("X-Sum"), []byte("1"))
	f.Add([]byte("Content-Length"), []byte("9"))
	got := string(http1.AppendLastChunk(http1.AppendChunkSize(nil, 255), f))
	if want := "ff\r\n0\r\nX-Sum: 1\r\n\r\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// FuzzChunked holds that what is accepted here is data that net/http reads the
// same, and that the size of the pieces does not matter.
func FuzzChunked(f *testing.F) {
	for _, row := range corpus(f, "chunked.txt") {
		f.Add([]byte(row.in), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, piece int) {
		piece = max(1, piece&63)
		data, rest, _, err := decode(string(in), 1<<20)
		dripped, dripRest, _, dripErr := decode(string(in), piece)
		if errors.Is(dripErr, http1.ErrShort) && outcome(err) == "400" {
			// Trailers that come in drips are looked at when they are complete: the
			// same bytes are refused, only later.
			dripped, dripRest, _, dripErr = decode(string(in)+"\r\n\r\n", piece)
		}
		if outcome(err) != outcome(dripErr) || errors.Is(err, io.EOF) && (data != dripped || rest != dripRest) {
			t.Fatalf("%q: at once %q, %v; in pieces of %d %q, %v", in, data, err, piece, dripped, dripErr)
		}
		if !errors.Is(err, io.EOF) {
			return
		}
		std, err := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(in)))
		if err != nil || string(std) != data {
			t.Fatalf("%q: got %q, net/http says %q, %v", in, data, std, err)
		}
	})
}
