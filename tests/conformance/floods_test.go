package conformance_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// What a hostile client may cost at most: memory that the proxies hold more, and
// what it sends before it is given up.
const (
	floodMemory = 32 << 20
	floodFrames = 30_000
	// floodMore is what a hostile client sends still after it was told to go.
	floodMore = 2000
	// floodServed is how many requests of each neighbour are answered while the floods go on, which do not end before.
	floodServed = 10
	neighbours  = 4
)

// hostile is a client of HTTP/2 that keeps to no rule but the framing.
type hostile struct {
	*xhttp2.Framer
	text bytes.Buffer
	enc  *hpack.Encoder
	next uint32
}

// flood is a way to keep a server busy. each sends the next piece of it; before,
// if any, comes first.
type flood struct {
	name     string
	settings []xhttp2.Setting
	before   func(h *hostile) error
	each     func(h *hostile) error
}

// request sends a head.
func (h *hostile) request(end bool) (stream uint32, err error) {
	h.text.Reset()
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: "app"}} {
		if err := h.enc.WriteField(f); err != nil {
			return 0, err
		}
	}
	stream = h.next
	h.next += 2
	return stream, h.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: stream, BlockFragment: h.text.Bytes(), EndHeaders: true, EndStream: end})
}

// opened sends a head without an end.
func opened(h *hostile) error { _, err := h.request(false); return err }

// floods are those that have become known: rapid reset (CVE-2023-44487), MadeYouReset
// (CVE-2025-8671), CONTINUATION (VU#421644), and those of 2019 (VU#605641).
func floods() []flood {
	bomb := func(h *hostile) error {
		h.text.Reset()
		for _, f := range []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: "app"}} {
			if err := h.enc.WriteField(f); err != nil {
				return err
			}
		}
		if err := h.enc.WriteField(hpack.HeaderField{Name: "x-bomb", Value: string(bytes.Repeat([]byte("b"), 3900))}); err != nil {
			return err
		}
		h.text.Write(bytes.Repeat([]byte{0x80 | 62}, 16000-h.text.Len()%16000)) // the newest entry, again and again
		h.next += 2
		return h.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: h.next - 2, BlockFragment: h.text.Bytes()[:min(h.text.Len(), 16384)], EndHeaders: true, EndStream: true})
	}
	return []flood{
		{name: "rapid reset", each: func(h *hostile) error {
			id, err := h.request(false)
			return errors.Join(err, h.WriteRSTStream(id, xhttp2.ErrCodeCancel))
		}},
		{name: "made you reset", each: func(h *hostile) error {
			id, err := h.request(false)
			return errors.Join(err, h.WriteRawFrame(xhttp2.FrameWindowUpdate, 0, id, make([]byte, 4)))
		}},
		{name: "CONTINUATION", before: func(h *hostile) error {
			return h.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}, each: func(h *hostile) error { return h.WriteContinuation(1, false, []byte{0x82}) }},
		{name: "empty CONTINUATION", before: func(h *hostile) error {
			return h.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}, each: func(h *hostile) error { return h.WriteContinuation(1, false, nil) }},
		{name: "PING", each: func(h *hostile) error { return h.WritePing(false, [8]byte{1}) }},
		{name: "SETTINGS", each: func(h *hostile) error { return h.WriteSettings() }},
		{name: "empty DATA", before: opened, each: func(h *hostile) error { return h.WriteData(1, false, nil) }},
		{name: "PRIORITY", before: opened, each: func(h *hostile) error {
			return h.WritePriority(1, xhttp2.PriorityParam{StreamDep: 3, Weight: 7})
		}},
		{name: "WINDOW_UPDATE", before: opened, each: func(h *hostile) error { return h.WriteWindowUpdate(1, 1) }},
		{name: "HPACK bomb", each: bomb},
		// Answers without room: each stream is given up by the client, for the next.
		{name: "zero window", settings: []xhttp2.Setting{{ID: xhttp2.SettingInitialWindowSize, Val: 0}}, each: func(h *hostile) error {
			id, err := h.request(true)
			return errors.Join(err, h.WriteRSTStream(id, xhttp2.ErrCodeCancel))
		}},
	}
}

// run floods one connection until it ends, and returns the code of the GOAWAY that
// came, and how many pieces were sent before.
func (f flood) run(ctx context.Context, dial func(context.Context) (net.Conn, error)) (xhttp2.ErrCode, int, error) {
	nc, err := dial(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer nc.Close() //nolint:errcheck // the proxy ends it
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, 0, err
	}
	out := bufio.NewWriterSize(nc, 16<<10) // as many frames as one write takes
	h := &hostile{Framer: xhttp2.NewFramer(out, nc), next: 1}
	h.enc = hpack.NewEncoder(&h.text)
	h.AllowIllegalWrites = true
	_, err = out.WriteString(xhttp2.ClientPreface)
	if err := errors.Join(err, h.WriteSettings(f.settings...), h.WriteSettingsAck()); err != nil { // else it could not know better
		return 0, 0, err
	}
	if f.before != nil {
		if err := f.before(h); err != nil {
			return 0, 0, err
		}
	}
	ended := make(chan error, 1)
	var code atomic.Uint32
	var told atomic.Bool
	go func() {
		for {
			frame, err := h.ReadFrame()
			if err != nil {
				told.Store(true)
				ended <- err
				return
			}
			if away, ok := frame.(*xhttp2.GoAwayFrame); ok {
				code.Store(uint32(away.ErrCode))
				told.Store(true)
			}
		}
	}()
	sent, more := 0, floodMore
	for sent < floodFrames && more > 0 && f.each(h) == nil { // writing fails once the proxy has gone
		if told.Load() {
			more--
		} else {
			sent++
		}
		if (sent+more)%50 == 0 {
			runtime.Gosched() // the neighbours are in this process, too
		}
	}
	_ = out.Flush()
	err = <-ended
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return xhttp2.ErrCode(code.Load()), sent, fmt.Errorf("the connection lives after %s", patience)
	}
	return xhttp2.ErrCode(code.Load()), sent, nil
}

// neighbour asks over one connection of HTTP/2 until it is stopped, and keeps how
// long the answers took.
type neighbour struct {
	client *http.Client
	mu     sync.Mutex
	took   []time.Duration
	failed []error
}

func newNeighbour(t *testing.T) *neighbour {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &neighbour{client: &http.Client{Transport: transport, Timeout: patience}}
}

func (n *neighbour) ask(ctx context.Context, address string) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		begun := time.Now()
		err := n.once(address)
		n.mu.Lock()
		n.took = append(n.took, time.Since(begun))
		if err != nil {
			n.failed = append(n.failed, err)
		}
		n.mu.Unlock()
	}
}

func (n *neighbour) once(address string) error {
	resp, err := n.client.Get("http://" + address + "/")
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return errors.Join(err, resp.Body.Close())
}

// street is the neighbours of a flood.
type street []*neighbour

// asked is how often the least busy neighbour has asked since p99 was.
func (s street) asked() int {
	least := math.MaxInt
	for _, n := range s {
		n.mu.Lock()
		least = min(least, len(n.took))
		n.mu.Unlock()
	}
	return least
}

// p99 returns that of what was asked since the last call, and of how many.
func (s street) p99() (time.Duration, int) {
	var all []time.Duration
	for _, n := range s {
		n.mu.Lock()
		all = append(all, n.took...)
		n.took = nil
		n.mu.Unlock()
	}
	if len(all) == 0 {
		return 0, 0
	}
	slices.Sort(all)
	return all[len(all)*99/100], len(all)
}

// wait returns once each neighbour was answered so often, whatever goes on.
func (s street) wait(n int) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for s.asked() < n {
		<-tick.C
	}
}

// TestFloods: each flood ends its connections with ENHANCE_YOUR_CALM and costs little memory, while the neighbours
// are served, none of them failing. Hostile are a client of the caller's proxy, and a proxy with a valid identity, which
// may have more streams and resets. What it costs is printed, beside what clients cost that keep to the rules and are as busy.
func TestFloods(t *testing.T) { //nolint:paralleltest // CPU and memory are measured
	p := pair(t, plainApp(t), catalog.ProtocolHTTP2)
	address := p.Upstreams["app"]
	var all street
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range neighbours {
		n := newNeighbour(t)
		if err := n.once(address); err != nil {
			t.Fatal(err)
		}
		all = append(all, n)
		asking.Go(func() { n.ask(ctx, address) })
	}
	defer func() {
		stop()
		asking.Wait()
		for _, n := range all {
			if len(n.failed) > 0 {
				t.Errorf("%d requests of a neighbour failed; the first: %v", len(n.failed), n.failed[0])
			}
		}
	}()
	upstream := func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", address) }
	for _, side := range []struct {
		name string
		pid  int
		dial func(context.Context) (net.Conn, error)
	}{{"a client", p.Caller.PID(), upstream}, {"a proxy", p.Callee.PID(), p.dialMesh}} {
		for _, f := range floods() {
			t.Run(side.name+"/"+f.name, func(t *testing.T) {
				suffer(t, all, side.pid, func() (int, error) {
					code, sent, err := f.run(ctx, side.dial)
					if err == nil && code != xhttp2.ErrCodeEnhanceYourCalm {
						err = fmt.Errorf("after %d pieces: GOAWAY %s, want ENHANCE_YOUR_CALM", sent, code)
					}
					return sent, err
				})
			})
		}
	}
	t.Run("as busy, by the rules", func(t *testing.T) {
		suffer(t, all, p.Caller.PID(), func() (int, error) {
			n := newNeighbour(t)
			for range 20 {
				if err := n.once(address); err != nil {
					return 0, err
				}
			}
			return 20, nil
		})
	})
}

// suffer runs trouble on several connections, again and again, until the neighbours were served beside it.
func suffer(t *testing.T, all street, pid int, trouble func() (int, error)) {
	t.Helper()
	const connections = 4
	cost := func() (time.Duration, uint64) {
		cpu, err := load.CPU([]int{pid})
		memory, err2 := rig.PrivateMemory(pid)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		return cpu, memory
	}
	all.p99()
	all.wait(floodServed)
	quiet, _ := all.p99()
	cpu, memory := cost()
	var running sync.WaitGroup
	var runs, most atomic.Int64
	var over atomic.Bool
	for range connections {
		running.Go(func() {
			for again := true; again; again = !over.Load() {
				sent, err := trouble()
				if err != nil {
					t.Error(err)
					return
				}
				runs.Add(1)
				most.Store(max(most.Load(), int64(sent)))
			}
		})
	}
	all.wait(floodServed)
	beside, served := all.p99()
	over.Store(true)
	running.Wait()
	cpuAfter, memoryAfter := cost()
	grown := int64(memoryAfter) - int64(memory)
	t.Logf("%d connections of up to %d pieces: CPU %s each, private memory %+d KiB; neighbours: %d served meanwhile, p99 %s, %.1f × that before", runs.Load(), most.Load(),
		((cpuAfter - cpu) / time.Duration(max(1, runs.Load()))).Round(time.Microsecond), grown>>10, served, beside.Round(time.Microsecond), float64(beside)/float64(max(1, quiet)))
	if grown > floodMemory {
		t.Errorf("private memory grew by %d KiB", grown>>10)
	}
}
