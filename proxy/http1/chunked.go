package http1

import "io"

// Bounds on what surrounds the data of a chunked body. Extensions carry
// nothing that anybody uses, so a whole body may have few bytes of them.
const (
	maxChunkLine  = 256
	maxExtensions = 4 << 10
	maxChunkDigit = 15
)

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkData
	chunkEnd
	chunkTrailers
	chunkDone
)

// ChunkDecoder decodes a chunked body (RFC 9112 section 7.1), strictly: sizes
// are plain hex, lines end in CRLF, extensions are bounded and dropped. The
// zero value is ready for a body; Reset makes it so again and keeps memory.
type ChunkDecoder struct {
	state      chunkState
	remaining  int64
	extensions int
	scanned    int
	trailers   Fields
}

// Reset makes d ready for another body.
func (d *ChunkDecoder) Reset() { *d = ChunkDecoder{trailers: d.trailers[:0]} }

// Done reports that the last chunk and the trailers were decoded.
func (d *ChunkDecoder) Done() bool { return d.state == chunkDone }

// Remaining returns how many bytes of the current chunk are still to come.
func (d *ChunkDecoder) Remaining() int64 {
	if d.state != chunkData {
		return 0
	}
	return d.remaining
}

// Trailers returns the trailer fields once Done, without those that may not be
// trailers. They are views into the last buffer given to Decode.
func (d *ChunkDecoder) Trailers() Fields { return d.trailers }

// Decode decodes what buf has, in place: data is a view into buf with all the
// bytes decoded, used is how many bytes of buf they took. The caller keeps
// buf[used:] and calls again with it and more. err is nil for more to come,
// io.EOF after the trailers, or an *[Error]. lim bounds the trailers and must
// have its defaults filled in.
func (d *ChunkDecoder) Decode(buf []byte, lim *Limits) (data []byte, used int, err error) {
	start, end := 0, 0 // of the data within buf
	for used < len(buf) && err == nil {
		rest := buf[used:]
		n := 0
		switch d.state {
		case chunkSize:
			n, err = d.sizeLine(rest)
		case chunkData:
			n = int(min(d.remaining, int64(len(rest))))
			if start == end {
				start, end = used, used
			}
			if end != used { // close the gap that the size line left
				copy(buf[end:], rest[:n])
			}
			end += n
			if d.remaining -= int64(n); d.remaining == 0 {
				d.state = chunkEnd
			}
		case chunkEnd:
			n, err = d.dataEnd(rest)
		case chunkTrailers:
			n, err = d.trailerSection(rest, lim)
		case chunkDone:
			err = io.EOF
		}
		if n == 0 {
			break
		}
		used += n
	}
	if d.state == chunkDone && err == nil {
		err = io.EOF
	}
	return buf[start:end:end], used, err
}

// sizeLine parses "SIZE[;EXT]CRLF" and returns its length, 0 if incomplete.
func (d *ChunkDecoder) sizeLine(b []byte) (int, error) {
	var size int64
	i := 0
	for ; i < len(b) && chars[b[i]]&isHex != 0; i++ {
		if i == maxChunkDigit {
			return 0, errChunkLarge
		}
		size = size<<4 | int64(unhex(b[i]))
	}
	if i == len(b) {
		return 0, nil
	}
	if i == 0 || b[i] != ';' && b[i] != '\r' {
		return 0, errChunkSize
	}
	ext := i
	for ; i < len(b) && b[i] != '\r'; i++ {
		if chars[b[i]]&isValue == 0 || i >= maxChunkLine {
			return 0, errChunkExt
		}
	}
	switch {
	case i+1 >= len(b):
		return 0, nil
	case b[i+1] != '\n':
		return 0, errChunkSize
	}
	if d.extensions += i - ext; d.extensions > maxExtensions {
		return 0, errChunkExt
	}
	d.remaining, d.state = size, chunkData
	if size == 0 {
		d.state = chunkTrailers
	}
	return i + 2, nil
}

// dataEnd expects the CRLF after a chunk's data.
func (d *ChunkDecoder) dataEnd(b []byte) (int, error) {
	if b[0] != '\r' || len(b) > 1 && b[1] != '\n' {
		return 0, errChunkEnd
	}
	if len(b) == 1 {
		return 0, nil
	}
	d.state = chunkSize
	return 2, nil
}

// trailerSection parses field lines up to the empty one and returns the
// section's length, 0 if incomplete.
func (d *ChunkDecoder) trailerSection(b []byte, lim *Limits) (int, error) {
	l := lines{buf: b, pos: d.scanned, lim: lim}
	if d.scanned > 0 {
		if err := l.skim(); err != nil {
			d.scanned = l.pos
			return 0, trailerError(err)
		}
		l.pos = 0
	}
	d.trailers = d.trailers[:0]
	for {
		line, err := l.next(errLineLong)
		if err != nil {
			d.scanned = l.pos
			return 0, trailerError(err)
		}
		if len(line) == 0 {
			break
		}
		if d.trailers, err = l.field(line, d.trailers); err != nil {
			return 0, err
		}
	}
	kept := d.trailers[:0]
	for _, field := range d.trailers {
		if !ForbiddenTrailer(field.ID) {
			kept = append(kept, field)
		}
	}
	d.trailers = kept
	d.state = chunkDone
	return l.pos, nil
}

func trailerError(err error) error {
	if err == ErrShort { //nolint:errorlint // never wrapped, by its contract
		return nil
	}
	return err
}

func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}
