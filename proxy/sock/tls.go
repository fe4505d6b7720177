package sock

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"reflect"
	"sync"
	"syscall"
	"unsafe"
)

const (
	recordHead = 5
	// recordMax is the longest record that TLS 1.3 allows (RFC 8446 section 5.2).
	recordMax = recordHead + 16<<10 + 256
	// inputSize holds a long record and the beginning of the next.
	inputSize = 32 << 10
)

// TLS is a TLS connection that keeps no memory for input while it has none,
// reads as many records at a time as are there, and waits for the next one
// without an allocation. Everything else is crypto/tls's: each record is
// opened there. One goroutine at a time may read, and one write. Make it with
// [NewTLS].
//
// crypto/tls reads a record into a buffer of its own, which it never gives
// back, through a reader that it makes anew for each (readFromUntil). It asks
// for neither once the record is in that buffer. So it is put there, which
// needs two unexported fields: their names and types are looked up, and
// without them TLS is the tls.Conn as it is.
type TLS struct {
	*tls.Conn
	under syscall.RawConn
	// raw are the records that were read, input what the last one held.
	raw   *bytes.Buffer
	input *bytes.Reader

	lent *[inputSize]byte // what raw is in; nil if crypto/tls made it, or raw is empty
	try  func(fd uintptr) bool
	n    int
	err  error // of a read
	dead error // that ended the connection
}

//nolint:gochecknoglobals // a pool is shared by design: its buffers belong to no connection
var inputs = sync.Pool{New: func() any { return new([inputSize]byte) }}

// fields tells where crypto/tls keeps what it read.
var fields = sync.OnceValue(func() (at struct { //nolint:gochecknoglobals // constant for a build
	raw, input uintptr
	known      bool
},
) {
	conn := reflect.TypeFor[tls.Conn]()
	raw, hasRaw := conn.FieldByName("rawInput")
	input, hasInput := conn.FieldByName("input")
	at.known = hasRaw && hasInput &&
		raw.Type == reflect.TypeFor[bytes.Buffer]() && input.Type == reflect.TypeFor[bytes.Reader]()
	at.raw, at.input = raw.Offset, input.Offset
	return at
})

// Wrap returns a plain TCP connection as a [Conn], and one of TLS after its
// handshake as a [TLS]; any other as it is.
func Wrap(nc net.Conn) net.Conn {
	switch nc := nc.(type) {
	case *net.TCPConn:
		return New(nc)
	case *tls.Conn:
		return NewTLS(nc)
	default:
		return nc
	}
}

// NewTLS returns conn, whose handshake is over, as a TLS. It does no I/O.
func NewTLS(conn *tls.Conn) *TLS {
	t := &TLS{Conn: conn}
	at := fields()
	sc, ok := conn.NetConn().(syscall.Conn)
	if !ok || !at.known || !direct || conn.ConnectionState().Version != tls.VersionTLS13 {
		return t
	}
	under, err := sc.SyscallConn()
	if err != nil {
		return t // it is closed, which Read will tell
	}
	t.under = under
	//nolint:gosec // the offsets are those of fields of exactly these types
	t.raw, t.input = (*bytes.Buffer)(unsafe.Add(unsafe.Pointer(conn), at.raw)), (*bytes.Reader)(unsafe.Add(unsafe.Pointer(conn), at.input))
	t.try = t.receive
	return t
}

// Read reads what one record held, or the rest of it.
func (t *TLS) Read(p []byte) (int, error) {
	if t.raw == nil {
		return t.Conn.Read(p)
	}
	if err := t.Await(); err != nil {
		return 0, err
	}
	n, err := t.Conn.Read(p)
	if err != nil && !isTimeout(err) {
		t.dead = err // crypto/tls would say the same; there is nothing to wait for
	}
	t.release()
	return n, err
}

// Await blocks until Read would return without waiting for more than a peer's
// housekeeping. While it waits for a record's first byte the connection has no
// buffer. After a deadline it may be called again.
func (t *TLS) Await() error {
	if t.raw == nil || t.input.Len() > 0 {
		return nil
	}
	if t.dead != nil {
		return t.dead
	}
	for !t.whole() {
		t.n, t.err = 0, nil
		err := t.under.Read(t.try)
		switch {
		case err != nil:
			if !isTimeout(err) {
				t.dead = err
			}
			return err
		case t.err != nil:
			// A reset is told once; after it the socket says that it ended.
			t.dead = &net.OpError{Op: "read", Net: "tcp", Source: t.LocalAddr(), Addr: t.RemoteAddr(), Err: t.err}
			return t.dead
		case t.n == 0:
			return nil // crypto/tls says what an end means here
		}
	}
	return nil
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// whole reports that raw begins with a whole record, or with what crypto/tls
// will refuse.
func (t *TLS) whole() bool {
	have := t.raw.Bytes()
	if len(have) < recordHead {
		return false
	}
	size := recordHead + int(have[3])<<8 + int(have[4])
	return len(have) >= size || size > recordMax || have[1] != 3 || have[2] != 3 // 0x0303, RFC 8446 section 5.2
}

// receive reads behind what raw has. It reports false while nothing is there.
func (t *TLS) receive(fd uintptr) bool {
	have := t.raw.Bytes()
	lent := t.lent
	if lent == nil {
		lent, _ = inputs.Get().(*[inputSize]byte)
	}
	var n int
	if len(have) == 0 {
		n, t.err = Read(fd, lent[:])
	} else {
		// A part of a record, to the front: input is empty, so that nothing
		// looks at what was before it.
		n, t.err = Read(fd, lent[copy(lent[:], have):])
	}
	if t.err == syscall.EAGAIN && len(have) == 0 { //nolint:errorlint // an errno as the kernel returns it
		t.err = nil
		t.lent = nil
		*t.raw = bytes.Buffer{}
		inputs.Put(lent)
		return false
	}
	t.lent, t.n = lent, n
	*t.raw = *bytes.NewBuffer(lent[: len(have)+n : inputSize])
	if t.err == syscall.EAGAIN { //nolint:errorlint // an errno as the kernel returns it
		t.err = nil
		return false
	}
	return true
}

// release gives the buffer back once nothing is in it.
func (t *TLS) release() {
	if t.raw.Len() > 0 || t.input.Len() > 0 {
		return
	}
	*t.raw = bytes.Buffer{}
	t.input.Reset(nil)
	if t.lent != nil {
		inputs.Put(t.lent)
		t.lent = nil
	}
}
