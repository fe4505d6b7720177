package store

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
)

// Saved states and dumps are one sequence of fields between a magic line and the
// SHA-256 of everything before it. Numbers are uvarints (encoding/binary),
// strings carry their length before them. The checksum detects damage; it does
// not authenticate.

type frameWriter struct {
	out *bufio.Writer
	sum hash.Hash
	tmp []byte
	err error
}

func newFrameWriter(w io.Writer, magic string) *frameWriter {
	f := &frameWriter{out: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
	f.raw([]byte(magic))
	return f
}

func (f *frameWriter) raw(b []byte) {
	if f.err == nil {
		f.sum.Write(b)
		_, f.err = f.out.Write(b)
	}
}

func (f *frameWriter) number(n uint64) {
	f.tmp = binary.AppendUvarint(f.tmp[:0], n)
	f.raw(f.tmp)
}

func (f *frameWriter) text(s string) {
	f.tmp = append(binary.AppendUvarint(f.tmp[:0], uint64(len(s))), s...)
	f.raw(f.tmp)
}

func (f *frameWriter) blob(b []byte) {
	f.number(uint64(len(b)))
	f.raw(b)
}

// finish writes the checksum and returns the first error of all writes.
func (f *frameWriter) finish() error {
	if f.err == nil {
		_, f.err = f.out.Write(f.sum.Sum(nil))
	}
	if f.err == nil {
		f.err = f.out.Flush()
	}
	return f.err
}

// frameReader reads what frameWriter wrote. Its first error sticks, later fields
// read as zero.
type frameReader struct {
	in  *bufio.Reader
	sum hash.Hash
	err error
}

func newFrameReader(r io.Reader, magic string) *frameReader {
	f := &frameReader{in: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	head := make([]byte, len(magic))
	f.raw(head)
	if f.err == nil && string(head) != magic {
		f.fail(fmt.Errorf("it does not begin with %q", magic[:len(magic)-1]))
	}
	return f
}

func (f *frameReader) fail(err error) {
	if f.err == nil {
		f.err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
}

func (f *frameReader) raw(b []byte) {
	if f.err != nil {
		return
	}
	if _, err := io.ReadFull(f.in, b); err != nil {
		f.fail(err)
		return
	}
	f.sum.Write(b)
}

// ReadByte lets binary.ReadUvarint read from f.
func (f *frameReader) ReadByte() (byte, error) {
	var b [1]byte
	f.raw(b[:])
	return b[0], f.err
}

func (f *frameReader) number() uint64 {
	n, err := binary.ReadUvarint(f)
	if err != nil {
		f.fail(err)
		return 0
	}
	return n
}

// blob reads at most limit bytes, so that a damaged length can't exhaust memory.
func (f *frameReader) blob(limit int) []byte {
	n := f.number()
	if f.err == nil && n > uint64(limit) { //nolint:gosec // limit is a positive constant
		f.fail(fmt.Errorf("a field of %d bytes, at most %d", n, limit))
	}
	if f.err != nil {
		return nil
	}
	b := make([]byte, n)
	f.raw(b)
	return b
}

func (f *frameReader) key() string {
	key := string(f.blob(MaxKey))
	if f.err == nil {
		if err := ValidateKey(key); err != nil {
			f.fail(err)
		}
	}
	return key
}

// generation reads the name of a generation, or "" where there may be none.
func (f *frameReader) generation() string {
	name := string(f.blob(64))
	if f.err == nil && name != "" {
		if err := ValidateGeneration(name); err != nil {
			f.fail(err)
		}
	}
	return name
}

// finish checks the checksum and that nothing follows it.
func (f *frameReader) finish() error {
	if f.err != nil {
		return f.err
	}
	want := f.sum.Sum(nil)
	have := make([]byte, len(want))
	if _, err := io.ReadFull(f.in, have); err != nil {
		f.fail(err)
	} else if !bytes.Equal(have, want) {
		f.fail(fmt.Errorf("the checksum is %x, computed %x", have, want))
	} else if _, err := f.in.ReadByte(); err != io.EOF {
		f.fail(fmt.Errorf("bytes follow the checksum"))
	}
	return f.err
}
