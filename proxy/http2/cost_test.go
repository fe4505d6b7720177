package http2_test

import (
	"encoding/binary"
	"net"
	"runtime"
	"sync"
	"testing"

	xhttp2 "golang.org/x/net/http2"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/l7"
)

// burst is a client that costs nothing itself: it sends the same requests again
// and again, a few at a time, and counts the ends of streams.
type burst struct {
	nc    net.Conn
	block []byte
	body  []byte
	out   []byte
	in    []byte
	next  uint32
}

func newBurst(tb testing.TB, addr string, body []byte) *burst {
	tb.Helper()
	r := dialRaw(tb, addr)
	r.block()
	enc := xhpack.NewEncoder(&r.out)
	enc.SetMaxDynamicTableSize(0) // so that one block is as good as another
	method := "GET"
	if body != nil {
		method = "POST"
	}
	for _, f := range [][2]string{{":method", method}, {":scheme", "http"}, {":authority", "app.example"}, {":path", "/a/b"}, {"user-agent", "burst"}, {"accept", "*/*"}} {
		if err := enc.WriteField(xhpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			tb.Fatal(err)
		}
	}
	r.check(r.WriteSettingsAck())
	r.check(r.WriteWindowUpdate(0, 1<<30))
	return &burst{nc: r.nc, block: r.out.Bytes(), body: body, in: make([]byte, 64<<10), next: 1}
}

// round sends n requests and waits for their answers.
func (b *burst) round(n int) error {
	b.out = b.out[:0]
	for range n {
		flags := byte(4)
		if b.body == nil {
			flags |= 1
		}
		b.frame(len(b.block), xhttp2.FrameHeaders, flags, b.block)
		if b.body != nil {
			b.frame(len(b.body), xhttp2.FrameData, 1, b.body)
		}
		b.next += 2
	}
	if _, err := b.nc.Write(b.out); err != nil {
		return err
	}
	kept, ended := 0, 0
	credit := 0
	for ended < n {
		m, err := b.nc.Read(b.in[kept:])
		if err != nil {
			return err
		}
		p := b.in[:kept+m]
		for len(p) >= 9 {
			size := int(p[0])<<16 | int(p[1])<<8 | int(p[2])
			if len(p) < 9+size {
				break
			}
			if kind := xhttp2.FrameType(p[3]); kind <= xhttp2.FrameHeaders && p[4]&1 != 0 {
				ended++
			}
			if p[3] == 0 {
				credit += size
			}
			p = p[9+size:]
		}
		kept = copy(b.in, p)
	}
	if credit == 0 {
		return nil
	}
	b.out = append(b.out[:0], 0, 0, 4, byte(xhttp2.FrameWindowUpdate), 0, 0, 0, 0, 0)
	_, err := b.nc.Write(binary.BigEndian.AppendUint32(b.out, uint32(credit)))
	return err
}

func (b *burst) frame(size int, kind xhttp2.FrameType, flags byte, p []byte) {
	b.out = append(b.out, byte(size>>16), byte(size>>8), byte(size), byte(kind), flags)
	b.out = append(binary.BigEndian.AppendUint32(b.out, b.next), p...)
}

// pooled are answers that cost nothing: text, or the request's body.
func pooled() l7.Handler {
	var answers sync.Pool
	body := make([]byte, 100)
	head := fields("content-type", "text/plain", "server", "x")
	return handler(func(ex *l7.Exchange) l7.Response {
		a, ok := answers.Get().(*answer)
		if !ok {
			a = &answer{}
			a.closed = func() { answers.Put(a) }
		}
		a.head = l7.ResponseHead{Status: 200, Fields: head, Length: 100}
		a.body, a.text = nil, body
		if ex.Body != nil {
			a.head.Length, a.body = -1, ex.Body
		}
		return a
	})
}

// A stream allocates nothing once there were as many before.
func TestStreamsAllocateNothing(t *testing.T) { //nolint:paralleltest // it counts the process's allocations
	if raceEnabled {
		t.Log("under the race detector pools drop what they are given")
		return
	}
	for name, body := range map[string][]byte{"GET": nil, "POST": make([]byte, 100)} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, pooled(), nil)
			s.recs.off.Store(true)
			b := newBurst(t, s.addr, body)
			const rounds, each = 12500, 8
			run := func(n int) {
				for range n {
					if err := b.round(each); err != nil {
						t.Fatal(err)
					}
				}
			}
			run(1000)
			before := mallocs()
			run(rounds)
			if per := float64(mallocs()-before) / (rounds * each); per > 0.05 {
				t.Errorf("%.3f allocations per stream", per)
			}
		})
	}
}

func mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}

// A connection that waits holds next to nothing, whatever went over it before.
func TestIdleConnectionsAreSmall(t *testing.T) { //nolint:paralleltest // memory is measured
	s := serve(t, pooled(), nil)
	s.recs.off.Store(true)
	const conns = 200
	before := heap()
	for range conns {
		b := newBurst(t, s.addr, make([]byte, 16000))
		if err := b.round(8); err != nil {
			t.Fatal(err)
		}
		b.out, b.in = nil, nil
	}
	for s.writers() > 0 {
		runtime.Gosched()
	}
	each := (int64(heap()) - int64(before)) / conns
	t.Logf("%d bytes per connection, of both ends", each)
	if each > 16<<10 && !raceEnabled {
		t.Errorf("an idle connection holds %d bytes", each)
	}
}

// BenchmarkServe is requests of 8 streams at a time.
func BenchmarkServe(b *testing.B) {
	s := serve(b, pooled(), nil)
	s.recs.off.Store(true)
	c := newBurst(b, s.addr, nil)
	b.ReportAllocs()
	for b.Loop() {
		if err := c.round(8); err != nil {
			b.Fatal(err)
		}
	}
}
