package load

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// UnaryPath and SmallPath or LargePath answer one message of gRPC with one.
	UnaryPath = "/bench.Bench/Unary"
	// StreamingPath and one of these answer each message with one, on one stream.
	StreamingPath = "/bench.Bench/Streaming"
	// EndlessPath answers with more than its client takes.
	EndlessPath = "/endless"

	grpcType     = "application/grpc"
	grpcPrefix   = 5 // of a message: not compressed, and its length
	backendLimit = 1000
)

// MessageLength is how many bytes a message of gRPC takes with its prefix.
func MessageLength(n int) int { return grpcPrefix + n }

// h2peer is a connection of HTTP/2 to the backend.
type h2peer struct {
	*link
	streams map[uint32]*answer
	waiting []*answer // for room
	backend *backend
	preface int // bytes of it that came
}

// answer is a stream of the backend.
type answer struct {
	stream  uint32
	grpc    bool
	source  []byte // what is sent, again and again
	pending int    // bytes of a message that have not come
	owed    int    // bytes that came and were not given back
	left    int    // bytes to be sent
	room    int64  // that the peer gave
	ended   bool   // the client's side
	over    bool
}

func newH2Peer(fd int, b *backend) *h2peer {
	p := &h2peer{streams: map[uint32]*answer{}, backend: b}
	p.link = newLink(fd, fd, p)
	p.hello(backendLimit)
	return p
}

// serve takes what came, and answers.
func (p *h2peer) serve(poll *poller, buf []byte) error {
	if p.preface < len(http2.ClientPreface) {
		n, err := read(p.fd, buf[:len(http2.ClientPreface)-p.preface])
		switch {
		case err == errAgain: //nolint:errorlint // our own, never wrapped
			return nil
		case err != nil:
			return err
		case n == 0 || string(buf[:n]) != http2.ClientPreface[p.preface:p.preface+n]:
			return errors.New("not HTTP/2")
		}
		p.preface += n
		return p.flush(poll)
	}
	if _, err := p.receive(buf); err != nil && err != errAgain { //nolint:errorlint // our own, never wrapped
		return err
	}
	err := p.flush(poll)
	for err == nil && !p.full && p.room > 0 && len(p.waiting) > 0 {
		if err = p.more(0, 0); err == nil {
			err = p.flush(poll)
		}
	}
	return err
}

// headers implements linkOwner.
func (p *h2peer) headers(stream uint32, fields []hpack.HeaderField, end bool) error {
	if p.streams[stream] != nil { // trailers
		return p.data(stream, nil, end)
	}
	a := &answer{stream: stream, room: p.initial, ended: end, pending: grpcPrefix + SmallLength}
	path := ""
	for _, f := range fields {
		switch f.Name {
		case ":path":
			path = f.Value
		case "content-type":
			a.grpc = f.Value == grpcType
		}
	}
	if a.source = p.backend.source(path, fields); a.source == nil {
		return fmt.Errorf("no such path: %q", path)
	}
	out := []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: grpcType}}
	if !a.grpc {
		a.left = len(a.source)
		out = append(out[:1], hpack.HeaderField{Name: "server", Value: "backend"},
			hpack.HeaderField{Name: "date", Value: "Thu, 01 Jan 2026 00:00:00 GMT"},
			hpack.HeaderField{Name: "content-type", Value: "text/plain; charset=utf-8"})
		if path != EndlessPath {
			out = append(out, hpack.HeaderField{Name: "content-length", Value: strconv.Itoa(a.left)})
		}
	}
	p.streams[stream] = a
	if err := p.head(stream, false, out); err != nil {
		return err
	}
	return p.pump(a)
}

// source is what a path is answered with: for gRPC, each message.
func (b *backend) source(path string, fields []hpack.HeaderField) []byte {
	switch path {
	case SmallPath:
		return b.endless[:SmallLength]
	case LargePath:
		return b.endless[:LargeLength]
	case UnaryPath + SmallPath, StreamingPath + SmallPath:
		return b.message[:grpcPrefix+SmallLength]
	case UnaryPath + LargePath, StreamingPath + LargePath:
		return b.largeMessage
	case EndlessPath:
		return b.endless
	case EchoPath:
		var text []byte
		for _, f := range fields {
			text = fmt.Appendf(text, "%s: %s\r\n", f.Name, f.Value)
		}
		return text
	}
	return nil
}

// data implements linkOwner: it counts messages of gRPC.
func (p *h2peer) data(stream uint32, payload []byte, end bool) error {
	a := p.streams[stream]
	if a == nil {
		return nil // it was reset
	}
	a.ended = a.ended || end
	if a.owed += len(payload); a.owed > streamCredit/2 && !a.ended {
		p.grant(stream, uint32(a.owed))
		a.owed = 0
	}
	for n := len(payload); a.grpc && n > 0; {
		took := min(n, a.pending)
		n, a.pending = n-took, a.pending-took
		if a.pending == 0 {
			a.left += len(a.source)
			a.pending = grpcPrefix + SmallLength
		}
	}
	return p.pump(a)
}

// more implements linkOwner.
func (p *h2peer) more(stream uint32, room int64) error {
	if stream != 0 {
		a := p.streams[stream]
		if a == nil {
			return nil
		}
		a.room += room
		return p.pump(a)
	}
	waiting := p.waiting
	p.waiting = nil
	for _, a := range waiting {
		if err := p.pump(a); err != nil {
			return err
		}
	}
	return nil
}

// resize implements linkOwner.
func (p *h2peer) resize(room int64) error {
	for _, a := range p.streams {
		a.room += room
		if err := p.pump(a); err != nil {
			return err
		}
	}
	return nil
}

// gone implements linkOwner.
func (p *h2peer) gone(stream uint32, _ http2.ErrCode) error {
	if a := p.streams[stream]; a != nil {
		a.over = true
		delete(p.streams, stream)
	}
	return nil
}

// pump sends what there is and may be sent of a stream.
func (p *h2peer) pump(a *answer) error {
	endless := len(a.source) == len(p.backend.endless)
	for a.left > 0 && !a.over {
		if len(p.out) > chunk { // the socket takes no more
			p.waiting = append(p.waiting, a)
			return nil
		}
		part := a.left % len(a.source)
		if part == 0 {
			part = len(a.source)
		}
		payload := a.source[len(a.source)-part:]
		sent := part - len(p.body(a.stream, payload, &a.room, !a.grpc && !endless))
		if a.left -= sent; endless {
			a.left = len(a.source)
		}
		if sent == part {
			continue
		}
		if a.room > 0 { // it is the connection that has none
			p.waiting = append(p.waiting, a)
		}
		return nil
	}
	if a.over || a.grpc && !a.ended {
		return nil
	}
	if a.grpc {
		if err := p.head(a.stream, true, []hpack.HeaderField{{Name: "grpc-status", Value: "0"}}); err != nil {
			return err
		}
	}
	a.over = true
	delete(p.streams, a.stream)
	return nil
}
