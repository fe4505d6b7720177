package sock_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/sock"
)

// pair returns both ends of a connection; near is under test.
func pair(tb testing.TB) (near *sock.Conn, far *net.TCPConn) {
	tb.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	var d net.Dialer
	c, err := d.DialContext(context.Background(), "tcp4", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tc, _ := c.(*net.TCPConn) // nil if it is none
	var ok bool
	if far, ok = s.(*net.TCPConn); !ok || tc == nil {
		tb.Fatal("not TCP")
	}
	near = sock.New(tc)
	tb.Cleanup(func() {
		_ = near.Close()
		_ = far.Close()
	})
	for _, conn := range []net.Conn{near, far} {
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			tb.Fatal(err)
		}
	}
	return near, far
}

// TestBulk moves more than any socket buffer holds, both ways at a time, so
// that reads and writes must wait for each other.
func TestBulk(t *testing.T) {
	near, far := pair(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	echoed := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{far}, struct{ io.Reader }{far})
		echoed <- errors.Join(err, far.CloseWrite())
	}()
	sent := make(chan error, 1)
	go func() {
		n, err := near.Write(want)
		if n != len(want) && err == nil {
			err = io.ErrShortWrite
		}
		sent <- errors.Join(err, near.CloseWrite())
	}()
	got, err := io.ReadAll(near)
	if err := errors.Join(err, <-sent, <-echoed); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, and not those that were sent", len(got))
	}
}

func TestReadEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(near *sock.Conn, far *net.TCPConn) error
		want error
	}{
		{"the peer closes", func(_ *sock.Conn, far *net.TCPConn) error { return far.Close() }, io.EOF},
		{"the peer resets", func(_ *sock.Conn, far *net.TCPConn) error {
			return errors.Join(far.SetLinger(0), far.Close())
		}, syscall.ECONNRESET},
		{"we close", func(near *sock.Conn, _ *net.TCPConn) error { return near.Close() }, net.ErrClosed},
		{"deadline", func(near *sock.Conn, _ *net.TCPConn) error {
			return near.SetReadDeadline(time.Unix(1, 0))
		}, os.ErrDeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := pair(t)
			ended := make(chan error, 1)
			go func() { ended <- c.end(near, far) }()
			n, err := near.Read(make([]byte, 10))
			if n != 0 || !errors.Is(err, c.want) {
				t.Errorf("Read is %d, %v; want 0, %v", n, err, c.want)
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestDeadlineIsTemporary holds what crypto/tls relies on: it goes on after a
// read that ran into its deadline, and after nothing else.
func TestDeadlineIsTemporary(t *testing.T) {
	near, far := pair(t)
	if err := near.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	_, err := near.Read(make([]byte, 1))
	timeout, ok := errors.AsType[net.Error](err)
	if !ok || !timeout.Timeout() || !timeout.Temporary() { //nolint:staticcheck // crypto/tls asks it
		t.Errorf("the error of a deadline is %v", err)
	}
	if err := near.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := near.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("after the deadline was lifted, Read is %d, %v", n, err)
	}
}

func TestWriteToResetPeer(t *testing.T) {
	near, far := pair(t)
	if err := errors.Join(far.SetLinger(0), far.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("Read is %v", err)
	}
	n, err := near.Write([]byte("x"))
	if n != 0 || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write is %d, %v; want 0 and EPIPE", n, err)
	}
	if failed, ok := errors.AsType[*net.OpError](err); !ok || failed.Op != "write" {
		t.Errorf("the error is %#v", err)
	}
}

// TestWriteDeadline counts what left before a peer that reads nothing made the
// write wait for too long.
func TestWriteDeadline(t *testing.T) {
	near, far := pair(t)
	block := make([]byte, 64<<20)
	if err := near.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := near.Write(block)
	if n == 0 || n == len(block) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write is %d, %v", n, err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.Copy(io.Discard, far); err != nil || got != int64(n) {
		t.Errorf("the peer got %d bytes, %v; Write said %d", got, err, n)
	}
}

func TestPeek(t *testing.T) {
	near, far := pair(t)
	raw, err := near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	look := func() (n int, err error) {
		t.Helper()
		if failed := raw.Read(func(fd uintptr) bool {
			n, err = sock.Peek(fd)
			return true
		}); failed != nil {
			t.Fatal(failed)
		}
		return n, err
	}
	if n, err := look(); n != 0 || !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("of a silent peer Peek is %d, %v", n, err)
	}
	if _, err := far.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // it takes nothing
		wait(t, raw)
		if n, err := look(); n != 1 || err != nil {
			t.Errorf("with a byte there Peek is %d, %v", n, err)
		}
	}
	if n, err := near.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Fatalf("Read is %d, %v", n, err)
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	wait(t, raw)
	if n, err := look(); n != 0 || err != nil {
		t.Errorf("after the end Peek is %d, %v", n, err)
	}
}

// wait returns once there is something to read, the end included.
func wait(t *testing.T, raw syscall.RawConn) {
	t.Helper()
	if err := raw.Read(func(fd uintptr) bool {
		_, err := sock.Peek(fd)
		return !errors.Is(err, syscall.EAGAIN)
	}); err != nil {
		t.Fatal(err)
	}
}

// TestWriteAll writes parts of many sizes, to a peer that reads slowly enough for the socket to fill within them.
func TestWriteAll(t *testing.T) {
	near, far := pair(t)
	var want []byte
	block := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	sizes := [][3]int{{0, 0, 0}, {1, 0, 2}, {0, 3, 0}, {5, 70_000, 9}, {4 << 20, 4 << 20, 4 << 20}, {0, 0, 7}}
	for _, s := range sizes {
		for i, n := range s {
			want = append(want, block[i:][:n-min(i, n)]...)
		}
	}
	failed := make(chan error, 1)
	go func() {
		for _, s := range sizes {
			var parts [3][]byte
			total := 0
			for i, n := range s {
				parts[i] = block[i:][:n-min(i, n)]
				total += len(parts[i])
			}
			if n, err := near.WriteAll(parts[0], parts[1], parts[2]); n != int64(total) || err != nil {
				failed <- fmt.Errorf("WriteAll of %v is %d, %w", s, n, err)
				return
			}
		}
		failed <- near.CloseWrite()
	}()
	got, err := io.ReadAll(far)
	if err := errors.Join(err, <-failed); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came, and not the %d that were sent", len(got), len(want))
	}
}

// TestWriteAllBreaks counts what left.
func TestWriteAllBreaks(t *testing.T) {
	near, far := pair(t)
	block := make([]byte, 32<<20)
	if err := near.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := near.WriteAll(block[:10], block, block)
	if n < 10 || n >= int64(2*len(block)) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("WriteAll is %d, %v", n, err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.Copy(io.Discard, far); err != nil || got != n {
		t.Errorf("the peer got %d bytes, %v; WriteAll said %d", got, err, n)
	}
}

// question is an Asker.
type question struct {
	ask  func() bool
	buf  [10]byte
	lent int
}

func (q *question) Ask() bool    { return q.ask() }
func (q *question) Lend() []byte { q.lent++; return q.buf[:] }
func (q *question) Return()      { q.lent-- }

// TestAskLent has what may be there before a question, between it and its answer, and instead of it.
func TestAskLent(t *testing.T) {
	for _, c := range []struct {
		name    string
		before  func(far *net.TCPConn) error
		ask     func(near *sock.Conn, far *net.TCPConn) bool
		n, lent int
		want    error
	}{
		{"answered at once", nil, func(near *sock.Conn, far *net.TCPConn) bool {
			_, err := near.Write([]byte("ping"))
			_, failed := far.Write([]byte("pong"))
			return errors.Join(err, failed) == nil
		}, 4, 1, nil},
		{"answered later", nil, func(near *sock.Conn, far *net.TCPConn) bool {
			go func() {
				if _, err := far.Read(make([]byte, 10)); err == nil {
					_, _ = far.Write([]byte("pong")) // the test reads it
				}
			}()
			_, err := near.Write([]byte("ping"))
			return err == nil
		}, 4, 1, nil},
		{"bytes before", func(far *net.TCPConn) error {
			_, err := far.Write([]byte("x"))
			return err
		}, func(*sock.Conn, *net.TCPConn) bool { panic("asked") }, 0, 0, sock.ErrBusy},
		{
			"an end before", func(far *net.TCPConn) error { return far.CloseWrite() },
			func(*sock.Conn, *net.TCPConn) bool { panic("asked") }, 0, 0, sock.ErrBusy,
		},
		{
			"a reset before", func(far *net.TCPConn) error { return errors.Join(far.SetLinger(0), far.Close()) },
			func(*sock.Conn, *net.TCPConn) bool { panic("asked") }, 0, 0, sock.ErrBusy,
		},
		{"not asked", nil, func(*sock.Conn, *net.TCPConn) bool { return false }, 0, 0, sock.ErrUnasked},
		{"an end for an answer", nil, func(_ *sock.Conn, far *net.TCPConn) bool { return far.CloseWrite() == nil }, 0, 0, io.EOF},
		{"a deadline", nil, func(near *sock.Conn, _ *net.TCPConn) bool {
			return near.SetReadDeadline(time.Unix(1, 0)) == nil
		}, 0, 0, os.ErrDeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := pair(t)
			if c.before != nil {
				if err := c.before(far); err != nil {
					t.Fatal(err)
				}
				raw, err := near.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				wait(t, raw)
			}
			q := &question{ask: func() bool { return c.ask(near, far) }}
			n, err := near.AskLent(q)
			if n != c.n || !errors.Is(err, c.want) || q.lent != c.lent {
				t.Errorf("AskLent is %d, %v with %d lent; want %d, %v, %d", n, err, q.lent, c.n, c.want, c.lent)
			}
		})
	}
}

func TestEmpty(t *testing.T) {
	near, _ := pair(t)
	if n, err := near.Read(nil); n != 0 || err != nil {
		t.Errorf("Read of nothing is %d, %v", n, err)
	}
	if n, err := near.Write(nil); n != 0 || err != nil {
		t.Errorf("Write of nothing is %d, %v", n, err)
	}
}

func TestNoAllocations(t *testing.T) {
	near, far := pair(t)
	buf := make([]byte, 100)
	per := testing.AllocsPerRun(1000, func() {
		if _, err := far.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(near, buf); err != nil {
			t.Fatal(err)
		}
		if _, err := near.WriteAll(buf[:10], buf[10:50], buf[50:]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(far, buf); err != nil {
			t.Fatal(err)
		}
	})
	if per != 0 {
		t.Errorf("%v allocations per round trip", per)
	}
}

// TestVain: who reads can tell whether there was something to read at once.
func TestVain(t *testing.T) {
	near, far := pair(t)
	if _, err := io.WriteString(far, "here"); err != nil {
		t.Fatal(err)
	}
	raw, err := near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Read(func(fd uintptr) bool { n, _ := sock.Peek(fd); return n > 0 }); err != nil { // until it is there
		t.Fatal(err)
	}
	q := &question{}
	if n, err := near.ReadLent(q); n != len("here") || err != nil {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if n := near.Vain(); n != 0 {
		t.Errorf("%d tries found nothing, and all was there", n)
	}
	if err := near.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := near.ReadLent(q); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v, with nothing there", n, err)
	}
	if n := near.Vain(); n != 1 {
		t.Errorf("%d tries found nothing, want 1", n)
	}
}
