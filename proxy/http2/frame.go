package http2

import "encoding/binary"

const (
	preface       = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	headerSize    = 9
	maxFrame      = 16 << 10 // that we accept, and send even if the peer takes more
	initialWindow = 65535
	maxWindow     = 1<<31 - 1
	lastStream    = 1<<31 - 1
)

// Frame types of RFC 9113 section 6.
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	framePriority     = 0x2
	frameReset        = 0x3
	frameSettings     = 0x4
	framePush         = 0x5
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// Settings of RFC 9113 section 6.5.2 and RFC 8441 section 3.
const (
	settingTableSize    = 0x1
	settingPush         = 0x2
	settingMaxStreams   = 0x3
	settingWindow       = 0x4
	settingFrameSize    = 0x5
	settingListSize     = 0x6
	settingConnect      = 0x8
	settingSize         = 6
	unlimitedStreams    = 1<<32 - 1
	smallestMaxFrame    = 16 << 10
	largestMaxFrameSize = 1<<24 - 1
)

type frameHeader struct {
	length int
	kind   byte
	flags  byte
	stream uint32
}

// parseHeader takes at least headerSize bytes.
func parseHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   b[3],
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]) & lastStream,
	}
}

func appendHeader(dst []byte, length int, kind, flags byte, stream uint32) []byte {
	//nolint:gosec // the bytes of numbers
	return append(dst, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

// putHeader writes a header over the first bytes of b.
func putHeader(b []byte, length int, kind, flags byte, stream uint32) {
	appendHeader(b[:0], length, kind, flags, stream)
}

func appendReset(dst []byte, stream uint32, code ErrCode) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(dst, 4, frameReset, 0, stream), uint32(code))
}

func appendWindowUpdate(dst []byte, stream uint32, n int) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(dst, 4, frameWindowUpdate, 0, stream), uint32(n)) //nolint:gosec // a window
}

func appendPing(dst []byte, ack bool, data []byte) []byte {
	flags := byte(0)
	if ack {
		flags = flagAck
	}
	return append(appendHeader(dst, 8, framePing, flags, 0), data...)
}

func appendGoAway(dst []byte, last uint32, code ErrCode, debug string) []byte {
	dst = appendHeader(dst, 8+len(debug), frameGoAway, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, last)
	return append(binary.BigEndian.AppendUint32(dst, uint32(code)), debug...)
}

func appendSetting(dst []byte, id uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(dst, id), value)
}
