package record_test

import (
	"crypto/tls"
	"io"
	"testing"

	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

// wire is a transport with given bytes.
type wire struct {
	record.Transport
	in   []byte
	step int
}

func (w *wire) Read(p []byte) (int, error) {
	n := copy(p[:min(len(p), w.step)], w.in)
	if w.in = w.in[n:]; n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (w *wire) ReadLent(l sock.Lender) (int, error) {
	n, err := w.Read(l.Lend())
	if n == 0 {
		l.Return()
	}
	return n, err
}

func (*wire) TryWrite(p []byte) (int, error) { return len(p), nil }

func (*wire) Write(p []byte) (int, error) { return len(p), nil }

// sink is a transport that keeps what is written.
type sink struct {
	record.Transport
	out []byte
}

func (s *sink) Write(p []byte) (int, error) {
	s.out = append(s.out, p...)
	return len(p), nil
}

// FuzzInner seals what it is given, in two records, and reads that and raw bytes behind it in steps: whatever a peer says that
// holds the key, reading ends and gives no more than was sealed.
func FuzzInner(f *testing.F) {
	f.Add([]byte("hello\x17"), []byte("world\x17\x00\x00"), []byte{}, uint8(255))
	f.Add([]byte{24, 0, 0, 1, 1, 22}, []byte{1, 0, 21}, []byte{23, 3, 3, 0, 1, 0}, uint8(1))
	f.Add([]byte{4, 0, 0, 9, 22}, []byte{24, 0, 0, 22}, []byte{21, 3, 3, 0, 2, 1, 0}, uint8(7))
	f.Fuzz(func(t *testing.T, a, b, raw []byte, step uint8) {
		if len(a) > 1<<15 || len(b) > 1<<15 {
			return
		}
		to := &sink{}
		client, err := record.Open(to, true, tls.TLS_AES_128_GCM_SHA256, secret(0, 32), secret(1, 32))
		if err != nil {
			t.Fatal(err)
		}
		for _, inner := range [][]byte{a, b} {
			if err := client.Send(inner); err != nil {
				t.Fatal(err)
			}
		}
		from := &wire{in: append(to.out, raw...), step: int(step) + 1}
		server, err := record.Open(from, false, tls.TLS_AES_128_GCM_SHA256, secret(1, 32), secret(0, 32))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(server)
		if len(got) > len(a)+len(b) {
			t.Errorf("%d bytes were sealed, %d read", len(a)+len(b), len(got))
		}
		if n, again := server.Read(make([]byte, 1)); n != 0 || again == nil {
			t.Errorf("after the end (%v) Read is %d, %v", err, n, again)
		}
	})
}
