package conformance_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
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
	floodFrames = 200_000
)

// hostile is a client of HTTP/2 that keeps to no rule but the framing.
type hostile struct {
	*xhttp2.Framer
	nc   net.Conn
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
// came, and how many pieces were sent.
func (f flood) run(ctx context.Context, address string) (xhttp2.ErrCode, int, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, 0, err
	}
	defer nc.Close() //nolint:errcheck // the proxy ends it
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, 0, err
	}
	h := &hostile{Framer: xhttp2.NewFramer(nc, nc), nc: nc, next: 1}
	h.enc = hpack.NewEncoder(&h.text)
	h.AllowIllegalWrites = true
	if _, err := io.WriteString(nc, xhttp2.ClientPreface); err != nil {
		return 0, 0, err
	}
	if err := h.WriteSettings(f.settings...); err != nil {
		return 0, 0, err
	}
	if f.before != nil {
		if err := f.before(h); err != nil {
			return 0, 0, err
		}
	}
	ended := make(chan error, 1)
	var code xhttp2.ErrCode
	go func() {
		for {
			frame, err := h.ReadFrame()
			if err != nil {
				ended <- err
				return
			}
			if away, ok := frame.(*xhttp2.GoAwayFrame); ok {
				code = away.ErrCode
			}
		}
	}()
	sent := 0
	for sent < floodFrames && f.each(h) == nil { // writing fails once the proxy has gone
		sent++
	}
	err = <-ended
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return code, sent, fmt.Errorf("the connection lives after %s", patience)
	}
	return code, sent, nil
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
	_, err = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	return errors.Join(err, resp.Body.Close())
}

// p99 returns that of what was asked since the last call.
func (n *neighbour) p99() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := n.took
	n.took = nil
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[len(all)*99/100]
}

// TestFloods: each flood ends its connection with ENHANCE_YOUR_CALM, costs little
// memory, and the neighbours are served. What it costs is printed.
func TestFloods(t *testing.T) { //nolint:paralleltest // CPU and memory are measured
	p := pair(t, plainApp(t), catalog.ProtocolHTTP2)
	address := p.Upstreams["app"]
	pids := []int{p.Caller.PID()}
	n := newNeighbour(t)
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	asking.Go(func() { n.ask(ctx, address) })
	defer func() {
		stop()
		asking.Wait()
		if len(n.failed) > 0 {
			t.Errorf("%d requests of the neighbour failed; the first: %v", len(n.failed), n.failed[0])
		}
	}()
	if err := n.once(address); err != nil {
		t.Fatal(err)
	}
	memory := func() uint64 {
		m, err := rig.PrivateMemory(pids[0])
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	before := memory()
	for _, f := range floods() {
		t.Run(f.name, func(t *testing.T) {
			const connections = 4
			calm := time.NewTimer(100 * time.Millisecond)
			<-calm.C
			quiet := n.p99()
			cpu, err := load.CPU(pids)
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			var running sync.WaitGroup
			pieces := make([]int, connections)
			for i := range pieces {
				running.Go(func() {
					code, sent, err := f.run(ctx, address)
					if pieces[i] = sent; err != nil || code != xhttp2.ErrCodeEnhanceYourCalm {
						t.Errorf("after %d pieces: GOAWAY %s, %v; want ENHANCE_YOUR_CALM", sent, code, err)
					}
				})
			}
			running.Wait()
			after, err := load.CPU(pids)
			if err != nil {
				t.Fatal(err)
			}
			grown := int64(memory()) - int64(before)
			t.Logf("%d connections of up to %d pieces in %s: CPU %s each, private memory %+d KiB, neighbour's p99 %s, before %s", connections, slices.Max(pieces),
				time.Since(begun).Round(time.Millisecond), ((after - cpu) / connections).Round(time.Microsecond), grown>>10, n.p99().Round(time.Microsecond), quiet.Round(time.Microsecond))
			if grown > floodMemory {
				t.Errorf("private memory grew by %d KiB", grown>>10)
			}
		})
	}
}
