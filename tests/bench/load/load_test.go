package load_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// server answers every request on every connection with what answer returns,
// which gets its number from 0 on.
func server(t *testing.T, answer func(n int) string) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	turns := make(chan int, 1)
	turns <- 0
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = nc.Close() }()
				buf := make([]byte, 4096)
				for {
					n, err := nc.Read(buf)
					if err != nil || !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
						return
					}
					turn := <-turns // one request at a time
					text := answer(turn)
					turns <- turn + 1
					if _, err := io.WriteString(nc, text); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

func ok(length int) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", length, strings.Repeat("x", length))
}

// At a rate every request that was due is counted, from when it was due: a
// server that stalls is not asked less, and those that had to wait have waited.
func TestStallIsNotOmitted(t *testing.T) {
	const (
		rate  = 200
		stall = 400 * time.Millisecond
	)
	address := server(t, func(n int) string {
		if n == 20 {
			timer := time.NewTimer(stall)
			<-timer.C
		}
		return ok(5)
	})
	job := load.Job{Address: address, Path: "/", Length: 5, Connections: 2, Rate: rate, Window: time.Second}
	out, err := job.Do(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := len(out.Latencies); got != rate {
		t.Errorf("%d latencies of %d requests that were due", got, rate)
	}
	if !slices.IsSorted(out.Latencies) {
		t.Error("the latencies are not sorted")
	}
	// Those that were due in the first half of the stall can't have been
	// answered before its second half was over.
	late := 0
	for _, d := range out.Latencies {
		if d >= stall/2 {
			late++
		}
	}
	if want := int(rate*(stall/2).Seconds()) - 1; late < want {
		t.Errorf("%d requests took longer than half of the stall, want at least %d: %v", late, want, out.Latencies)
	}
	if out.Max < stall {
		t.Errorf("the longest took %s, the server stalled for %s", out.Max, stall)
	}
	if out.P99 < stall/2 || out.P99 > out.Max || out.P50 > out.P99 {
		t.Errorf("p50 %s, p99 %s, max %s", out.P50, out.P99, out.Max)
	}
}

func TestSaturationCountsWithinTheWindow(t *testing.T) {
	answered := 0
	address := server(t, func(n int) string {
		answered = n + 1
		return ok(1000)
	})
	job := load.Job{
		Address: address, Path: "/", Length: 1000, Connections: 4, Window: time.Hour, Requests: 500,
		Processes: [][]int{{os.Getpid()}, {os.Getpid()}},
	}
	out, err := job.Do(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if out.Requests < 500 || out.Requests > answered || len(out.Latencies) != out.Requests {
		t.Errorf("%d requests and %d latencies, the server answered %d", out.Requests, len(out.Latencies), answered)
	}
	if out.Bytes < int64(out.Requests)*1000 {
		t.Errorf("%d bytes with %d bodies of 1000", out.Bytes, out.Requests)
	}
	if len(out.CPU) != 2 || out.CPU[0] <= 0 || out.PerRequest() <= 0 || len(out.Private) != 2 || out.Private[0] == 0 {
		t.Errorf("cost: %v, %v", out.CPU, out.Private)
	}
}

func TestWrongAnswers(t *testing.T) {
	tests := map[string]struct{ answer, want string }{
		"status":       {"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nsorry", "not a 200 response"},
		"short":        {ok(4), "a response of 4 bytes, want 5"},
		"long":         {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n123456", "1 bytes more"},
		"no length":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "without a length"},
		"two of them":  {ok(5) + ok(5), "more than the 5"},
		"nothing like": {"220 smtp.example.com\r\n\r\n", "not a 200 response"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			address := server(t, func(int) string { return tc.answer })
			job := load.Job{Address: address, Path: "/", Length: 5, Connections: 1, Window: time.Hour}
			if _, err := job.Do(t.Context()); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestClosedConnection(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	job := load.Job{Address: address, Path: "/", Length: 5, Connections: 1, Window: time.Hour}
	if _, err := job.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "connect to "+address) {
		t.Errorf("%v, want that it can't connect", err)
	}
}

// A response that comes byte by byte is the same response.
func TestAnswerInPieces(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = nc.Close() }()
		buf := make([]byte, 4096)
		for {
			if _, err := nc.Read(buf); err != nil {
				return
			}
			for _, c := range []byte(ok(20)) {
				if _, err := nc.Write([]byte{c}); err != nil {
					return
				}
			}
		}
	}()
	job := load.Job{Address: l.Addr().String(), Path: "/", Length: 20, Connections: 1, Window: time.Hour, Requests: 10}
	out, err := job.Do(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if out.Requests != 10 {
		t.Errorf("%d requests, want 10", out.Requests)
	}
}

// backend serves on two sockets until the test's process ends.
func backend(t *testing.T) (http, stream, h2 string) {
	t.Helper()
	var addresses []string
	var files []*os.File
	for range 3 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		tl, ok := l.(*net.TCPListener)
		if !ok {
			t.Fatal("not TCP")
		}
		file, err := tl.File()
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close() // the file keeps the socket
		addresses, files = append(addresses, l.Addr().String()), append(files, file)
	}
	go func() {
		if err := load.Serve(files[0], files[1], files[2]); err != nil {
			panic(err)
		}
	}()
	return addresses[0], addresses[1], addresses[2]
}

func TestBackend(t *testing.T) {
	http, stream, _ := backend(t)
	t.Run("pipelined, in pieces", func(t *testing.T) {
		nc, err := net.Dial("tcp", http)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = nc.Close() }()
		head := "GET " + load.EchoPath + " HTTP/1.1\r\nx-test: 1\r\n\r\n"
		all := head + "GET " + load.SmallPath + " HTTP/1.1\r\n\r\n" + head
		for len(all) > 0 {
			n := min(len(all), 30)
			if _, err := io.WriteString(nc, all[:n]); err != nil {
				t.Fatal(err)
			}
			all = all[n:]
		}
		for i, want := range []string{head, strings.Repeat("b", load.SmallLength), head} {
			if diff := cmp.Diff(want, body(t, nc, len(want))); diff != "" {
				t.Errorf("answer %d: %s", i, diff)
			}
		}
	})
	t.Run("saturation", func(t *testing.T) {
		job := load.Job{Address: http, Path: load.LargePath, Length: load.LargeLength, Connections: 8, Window: time.Hour, Requests: 2000}
		if out, err := job.Do(t.Context()); err != nil || out.Requests < 2000 {
			t.Errorf("%d requests, error %v", out.Requests, err)
		}
	})
	t.Run("stream", func(t *testing.T) {
		nc, err := net.Dial("tcp", stream)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = nc.Close() }()
		if _, err := nc.Write([]byte{0}); err != nil {
			t.Fatal(err)
		}
		if n, err := io.CopyN(io.Discard, nc, 8<<20); err != nil {
			t.Errorf("%d bytes, then %v", n, err)
		}
	})
}

// body reads one response whose body has a length.
func body(t *testing.T, nc net.Conn, length int) string {
	t.Helper()
	var head []byte
	for one := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, one[0]) {
		if _, err := io.ReadFull(nc, one); err != nil {
			t.Fatalf("after %q: %v", head, err)
		}
	}
	if !bytes.Contains(head, fmt.Appendf(nil, "Content-Length: %d\r\n", length)) {
		t.Errorf("head %q, want a length of %d", head, length)
	}
	out := make([]byte, length)
	if _, err := io.ReadFull(nc, out); err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestFamily(t *testing.T) {
	pids, err := rig.Family(os.Getpid())
	if err != nil || len(pids) == 0 || pids[0] != os.Getpid() {
		t.Errorf("%v, %v", pids, err)
	}
	if _, err := load.CPU([]int{1<<22 + 1}); err == nil {
		t.Error("there is no such process")
	}
}
