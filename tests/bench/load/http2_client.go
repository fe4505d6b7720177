package load

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Kinds of calls over HTTP/2; the empty one is HTTP/1.1.
const (
	// CallGet is a request without a body.
	CallGet = "h2"
	// CallUnary is a gRPC call of one message each way.
	CallUnary = "unary"
	// CallStreaming sends the next message on the stream once the one before is
	// answered.
	CallStreaming = "streaming"
)

// mostRefused is how many streams may be refused on a connection.
const mostRefused = 100

// h2conn is a connection of HTTP/2 of the client, with a place for each of the
// streams that it keeps open.
type h2conn struct {
	*link
	client  *client
	first   int // of its places among the client's
	places  map[uint32]int
	next    uint32 // stream
	slow    map[uint32]bool
	starved []int // places that wait for room
	refused int   // streams, so far
	dirty   bool  // something is queued
}

// place is the stream of one of the client's requests.
type place struct {
	stream uint32
	room   int64
	unsent []byte // of a message
	owed   int    // bytes that came and were not given back
	headed bool
}

// connect2 opens the connections of HTTP/2; as many requests run on each as the
// job has streams.
func (c *client) connect2() error {
	for i := range c.job.Connections {
		fd, err := dial(c.job.Address)
		if err != nil {
			return err
		}
		h := &h2conn{client: c, first: i * c.job.Streams, places: map[uint32]int{}, slow: map[uint32]bool{}, next: 1}
		h.link = newLink(fd, i, h)
		h.out = append(h.out, http2.ClientPreface...)
		h.hello(0)
		c.links = append(c.links, h)
		if err := c.poll.add(fd, i); err != nil {
			return err
		}
		for range c.job.Slow {
			if err := h.stall(); err != nil {
				return err
			}
		}
		for range c.job.Streams {
			c.conns = append(c.conns, conn{fd: -1, left: -1})
		}
	}
	c.places = make([]place, len(c.conns))
	for i := range c.conns {
		if c.job.Rate > 0 {
			c.idle = append(c.idle, i)
		} else if err := c.send(i, c.now()); err != nil {
			return err
		}
	}
	return c.flush()
}

// flush writes what was queued on all connections.
func (c *client) flush() error {
	for _, h := range c.touched {
		h.dirty = false
		if err := h.link.flush(c.poll); err != nil {
			return err
		}
	}
	c.touched = c.touched[:0]
	return nil
}

func (h *h2conn) touch() {
	if !h.dirty {
		h.dirty = true
		h.client.touched = append(h.client.touched, h)
	}
}

// head are the fields of a request.
func (c *client) head(path string) []hpack.HeaderField {
	method := "GET"
	if c.job.Call != CallGet {
		method = "POST"
	}
	out := []hpack.HeaderField{
		{Name: ":method", Value: method},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: path},
		{Name: ":authority", Value: "api.default.mesh"},
		{Name: "user-agent", Value: "bench"},
	}
	if c.job.Call == CallGet {
		return append(out, hpack.HeaderField{Name: "accept", Value: "*/*"})
	}
	return append(out, hpack.HeaderField{Name: "content-type", Value: grpcType}, hpack.HeaderField{Name: "te", Value: "trailers"})
}

// stall opens a stream whose endless answer is never given more room than it has
// at first.
func (h *h2conn) stall() error {
	h.slow[h.next] = true
	h.next += 2
	fields := h.client.head(EndlessPath)
	fields[0].Value = "GET"
	return h.head(h.next-2, true, fields)
}

// send2 sends the request of a place: a new stream, or a message on an old one.
func (c *client) send2(i int) error {
	h, p := c.links[i/c.job.Streams], &c.places[i]
	h.touch()
	if p.stream == 0 {
		*p = place{stream: h.next, room: h.initial}
		h.places[p.stream] = i
		h.next += 2
		if err := h.head(p.stream, c.job.Call == CallGet, c.fields); err != nil {
			return err
		}
	}
	if c.job.Call != CallGet {
		p.unsent = c.ask
		h.push(i)
	}
	return nil
}

// push sends what may be sent of a message.
func (h *h2conn) push(i int) {
	p := &h.client.places[i]
	h.touch()
	p.unsent = h.body(p.stream, p.unsent, &p.room, h.client.job.Call == CallUnary)
	if len(p.unsent) > 0 && p.room > 0 {
		h.starved = append(h.starved, i)
	}
}

// headers implements linkOwner.
func (h *h2conn) headers(stream uint32, fields []hpack.HeaderField, end bool) error {
	i, ok := h.places[stream]
	if !ok {
		if h.slow[stream] && fields[0].Value == "200" && !end {
			return nil
		}
		return fmt.Errorf("fields of a stream that nobody asked for: %v", fields)
	}
	c, p := h.client, &h.client.places[i]
	if !p.headed {
		for _, f := range fields {
			if f.Name == ":status" && f.Value != "200" || f.Name == "content-length" && f.Value != strconv.Itoa(c.job.Length) {
				return fmt.Errorf("not a 200 response with %d bytes: %v", c.job.Length, fields)
			}
		}
		p.headed = true
	} else if len(fields) == 0 || fields[0].Name != "grpc-status" || fields[0].Value != "0" {
		return fmt.Errorf("trailers without success: %v", fields)
	}
	if end {
		return h.over(i)
	}
	return nil
}

// over is the end of a stream.
func (h *h2conn) over(i int) error {
	c := h.client
	p := &c.places[i]
	if c.conns[i].left != 0 || c.job.Call == CallStreaming {
		return fmt.Errorf("a stream ended, %d bytes short", c.conns[i].left)
	}
	delete(h.places, p.stream)
	*p = place{}
	return c.answered(i)
}

// data implements linkOwner.
func (h *h2conn) data(stream uint32, payload []byte, end bool) error {
	i, ok := h.places[stream]
	if !ok {
		if h.slow[stream] && !end {
			return nil
		}
		return errors.New("bytes of a stream that nobody asked for")
	}
	c, p, co := h.client, &h.client.places[i], &h.client.conns[i]
	if co.left -= len(payload); co.left < 0 {
		return fmt.Errorf("a response has %d bytes more than the %d that it should have", -co.left, c.job.Length)
	}
	if end {
		if c.job.Call == CallUnary {
			return errors.New("a gRPC call ended without trailers")
		}
		return h.over(i)
	}
	if p.owed += len(payload); p.owed > streamCredit/2 {
		h.touch()
		h.grant(stream, uint32(p.owed))
		p.owed = 0
	}
	if co.left == 0 && c.job.Call == CallStreaming {
		return c.answered(i)
	}
	return nil
}

// more implements linkOwner.
func (h *h2conn) more(stream uint32, room int64) error {
	if stream != 0 {
		if i, ok := h.places[stream]; ok {
			h.client.places[i].room += room
			h.push(i)
		}
		return nil
	}
	starved := h.starved
	h.starved = nil
	for _, i := range starved {
		h.push(i)
	}
	return nil
}

// resize implements linkOwner.
func (h *h2conn) resize(room int64) error {
	for _, i := range h.places {
		h.client.places[i].room += room
		h.push(i)
	}
	return nil
}

// gone implements linkOwner. What a proxy refused was not begun (RFC 9113 section
// 8.7): it is sent again, as every client does.
func (h *h2conn) gone(stream uint32, code http2.ErrCode) error {
	i, ok := h.places[stream]
	if !ok && !h.slow[stream] {
		return nil // it was answered
	}
	if ok && code == http2.ErrCodeRefusedStream && h.refused < mostRefused {
		h.refused++
		delete(h.places, stream)
		h.client.places[i] = place{}
		h.client.conns[i].left = h.client.job.Length
		return h.client.send2(i)
	}
	return fmt.Errorf("a stream was reset: %s", code)
}

// receive2 takes what came on a connection.
func (c *client) receive2(i int) error {
	h := c.links[i]
	h.touch()
	n, err := h.receive(c.buf)
	if c.measuring {
		c.out.Bytes += int64(n)
	}
	if err == errAgain { //nolint:errorlint // our own, never wrapped
		err = nil
	}
	if err != nil {
		return fmt.Errorf("receive from %s: %w", c.job.Address, err)
	}
	return c.flush()
}
