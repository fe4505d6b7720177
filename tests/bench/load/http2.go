package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// Flow control of both ends: a stream's credit is what RFC 9113 gives it at
// first (§6.9.2), a connection's is never what is waited for.
const (
	streamCredit     = 65535
	connectionCredit = 1 << 30
	frameHeader      = 9
)

// link is one end of an HTTP/2 connection: as much of RFC 9113 as two ends need
// that trust what lies between them. The zero value is not usable; see newLink.
type link struct {
	fd     int
	number int // of its socket, at the poller
	owner  linkOwner

	in, out []byte // what has not come whole, what has not been written
	full    bool   // the socket did not take all of it
	dec     *hpack.Decoder
	enc     *hpack.Encoder
	encoded bytes.Buffer
	fields  []hpack.HeaderField // of the block that is being decoded
	block   []byte              // of HEADERS without END_HEADERS
	opened  http2.FrameHeader   // of these

	room     int64 // that DATA may still take of the connection
	initial  int64 // and of a new stream
	largest  int   // frame that the peer takes
	received int64 // that the peer was not given back yet
}

// linkOwner is told what comes. An error ends the connection.
type linkOwner interface {
	// headers is a field section; fields are valid until it returns.
	headers(stream uint32, fields []hpack.HeaderField, end bool) error
	// data is so many bytes of a stream's DATA, without padding.
	data(stream uint32, payload []byte, end bool) error
	// more is room for a stream, or with 0 for the connection.
	more(stream uint32, room int64) error
	// resize is room for every stream; a negative one takes back.
	resize(room int64) error
	// gone is a stream that the peer gave up.
	gone(stream uint32, code http2.ErrCode) error
}

func newLink(fd, number int, owner linkOwner) *link {
	l := &link{fd: fd, number: number, owner: owner, room: streamCredit, initial: streamCredit, largest: 16384}
	l.dec = hpack.NewDecoder(4096, func(f hpack.HeaderField) { l.fields = append(l.fields, f) })
	l.enc = hpack.NewEncoder(&l.encoded)
	return l
}

// hello queues what an end sends first, after a client's preface.
func (l *link) hello(streams uint32) {
	var settings []byte
	for _, s := range []http2.Setting{
		{ID: http2.SettingInitialWindowSize, Val: streamCredit}, {ID: http2.SettingMaxConcurrentStreams, Val: streams}, {ID: http2.SettingEnablePush, Val: 0},
	} {
		settings = binary.BigEndian.AppendUint16(settings, uint16(s.ID))
		settings = binary.BigEndian.AppendUint32(settings, s.Val)
	}
	l.frame(http2.FrameSettings, 0, 0, settings)
	l.grant(0, connectionCredit-streamCredit)
}

// frame queues a frame.
func (l *link) frame(kind http2.FrameType, flags http2.Flags, stream uint32, payload []byte) {
	n := len(payload)
	l.out = append(l.out, byte(n>>16), byte(n>>8), byte(n), byte(kind), byte(flags))
	l.out = binary.BigEndian.AppendUint32(l.out, stream)
	l.out = append(l.out, payload...)
}

func (l *link) grant(stream uint32, n uint32) {
	var payload [4]byte
	binary.BigEndian.PutUint32(payload[:], n)
	l.frame(http2.FrameWindowUpdate, 0, stream, payload[:])
}

// head queues a field section, which must fit into one frame.
func (l *link) head(stream uint32, end bool, fields []hpack.HeaderField) error {
	l.encoded.Reset()
	for _, f := range fields {
		if err := l.enc.WriteField(f); err != nil {
			return err
		}
	}
	flags := http2.FlagHeadersEndHeaders
	if end {
		flags |= http2.FlagHeadersEndStream
	}
	l.frame(http2.FrameHeaders, flags, stream, l.encoded.Bytes())
	return nil
}

// body queues DATA of as much of payload as the windows allow, of which room is
// the stream's, and returns the rest. The last of it ends the stream if end.
func (l *link) body(stream uint32, payload []byte, room *int64, end bool) []byte {
	for len(payload) > 0 {
		n := min(int64(len(payload)), l.room, *room, int64(l.largest))
		if n <= 0 {
			break
		}
		var flags http2.Flags
		if end && n == int64(len(payload)) {
			flags = http2.FlagDataEndStream
		}
		l.frame(http2.FrameData, flags, stream, payload[:n])
		l.room, *room = l.room-n, *room-n
		payload = payload[n:]
	}
	return payload
}

// receive reads once from the socket and handles what has come whole. It returns
// how many bytes came; errAgain if there were none.
func (l *link) receive(buf []byte) (int, error) {
	n, err := read(l.fd, buf)
	if err == nil && n == 0 {
		err = errors.New("the connection was closed")
	}
	if err != nil {
		return 0, err
	}
	data := buf[:n]
	if len(l.in) > 0 {
		l.in = append(l.in, data...)
		data = l.in
	}
	for len(data) >= frameHeader {
		size := int(data[0])<<16 | int(data[1])<<8 | int(data[2])
		if len(data) < frameHeader+size {
			break
		}
		h := http2.FrameHeader{
			Length: uint32(size), Type: http2.FrameType(data[3]), Flags: http2.Flags(data[4]),
			StreamID: binary.BigEndian.Uint32(data[5:]) & (1<<31 - 1),
		}
		if err := l.handle(h, data[frameHeader:frameHeader+size]); err != nil {
			return n, fmt.Errorf("frame %v: %w", h, err)
		}
		data = data[frameHeader+size:]
	}
	l.in = append(l.in[:0], data...) // both may be the same memory: it moves down
	return n, nil
}

// handle handles a frame.
func (l *link) handle(h http2.FrameHeader, payload []byte) error {
	switch h.Type { //nolint:exhaustive // the others say nothing to these ends
	case http2.FrameData:
		l.received += int64(h.Length)
		if l.received > connectionCredit/2 {
			l.grant(0, uint32(l.received))
			l.received = 0
		}
		payload, err := unpad(h, payload, 0)
		if err != nil {
			return err
		}
		return l.owner.data(h.StreamID, payload, h.Flags.Has(http2.FlagDataEndStream))
	case http2.FrameHeaders:
		skip := 0
		if h.Flags.Has(http2.FlagHeadersPriority) {
			skip = 5
		}
		payload, err := unpad(h, payload, skip)
		if err != nil {
			return err
		}
		l.opened, l.block = h, append(l.block[:0], payload...)
		return l.section(h.Flags.Has(http2.FlagHeadersEndHeaders))
	case http2.FrameContinuation:
		l.block = append(l.block, payload...)
		return l.section(h.Flags.Has(http2.FlagContinuationEndHeaders))
	case http2.FrameSettings:
		return l.settings(h, payload)
	case http2.FramePing:
		if !h.Flags.Has(http2.FlagPingAck) {
			l.frame(http2.FramePing, http2.FlagPingAck, 0, payload)
		}
	case http2.FrameWindowUpdate:
		n := int64(binary.BigEndian.Uint32(payload))
		if h.StreamID == 0 {
			l.room += n
		}
		return l.owner.more(h.StreamID, n)
	case http2.FrameRSTStream:
		return l.owner.gone(h.StreamID, http2.ErrCode(binary.BigEndian.Uint32(payload)))
	case http2.FrameGoAway:
		return fmt.Errorf("the peer goes away: %s %q", http2.ErrCode(binary.BigEndian.Uint32(payload[4:])), payload[8:])
	}
	return nil
}

// unpad takes padding and what precedes a frame's content away.
func unpad(h http2.FrameHeader, payload []byte, skip int) ([]byte, error) {
	pad := 0
	if h.Flags.Has(http2.FlagDataPadded) && len(payload) > 0 { // the same bit in DATA and HEADERS
		pad, payload = int(payload[0]), payload[1:]
	}
	if len(payload) < pad+skip {
		return nil, errors.New("more padding than payload")
	}
	return payload[skip : len(payload)-pad], nil
}

// section decodes a whole field section.
func (l *link) section(whole bool) error {
	if !whole {
		return nil
	}
	l.fields = l.fields[:0]
	if _, err := l.dec.Write(l.block); err != nil {
		return err
	}
	if err := l.dec.Close(); err != nil {
		return err
	}
	return l.owner.headers(l.opened.StreamID, l.fields, l.opened.Flags.Has(http2.FlagHeadersEndStream))
}

func (l *link) settings(h http2.FrameHeader, payload []byte) error {
	if h.Flags.Has(http2.FlagSettingsAck) {
		return nil
	}
	for ; len(payload) >= 6; payload = payload[6:] {
		v := binary.BigEndian.Uint32(payload[2:])
		switch http2.SettingID(binary.BigEndian.Uint16(payload)) { //nolint:exhaustive // the others are not made use of
		case http2.SettingHeaderTableSize:
			l.enc.SetMaxDynamicTableSizeLimit(min(v, 4096))
		case http2.SettingInitialWindowSize:
			change := int64(v) - l.initial
			l.initial = int64(v)
			if err := l.owner.resize(change); err != nil {
				return err
			}
		case http2.SettingMaxFrameSize:
			l.largest = int(v)
		}
	}
	l.frame(http2.FrameSettings, http2.FlagSettingsAck, 0, nil)
	return nil
}

// flush writes what is queued, and has the poller tell when the socket takes
// the rest.
func (l *link) flush(poll *poller) error {
	if len(l.out) > 0 {
		n, err := write(l.fd, l.out)
		if err != nil && err != errAgain { //nolint:errorlint // our own, never wrapped
			return err
		}
		l.out = l.out[:copy(l.out, l.out[n:])]
	}
	if full := len(l.out) > 0; full != l.full {
		l.full = full
		events := uint32(unix.EPOLLIN)
		if full {
			events |= unix.EPOLLOUT
		}
		return poll.set(l.fd, l.number, events)
	}
	return nil
}
