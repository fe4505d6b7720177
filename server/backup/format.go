package backup

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/store"
)

var (
	// ErrFormat is wrapped when a file is no snapshot, or of a form that this
	// version does not know.
	ErrFormat = errors.New("not a snapshot")
	// ErrDamaged is wrapped when a snapshot was cut off or changed.
	ErrDamaged = errors.New("the snapshot is damaged")
	// ErrForeign is wrapped when a snapshot is of another cluster, or can't be used
	// by this one.
	ErrForeign = errors.New("the snapshot is not of this cluster")
)

const (
	magic     = "meshd snapshot 1\n"
	maxHeader = 4 << 10
	// chunkSize is how much one chunk encrypts. Nothing of it is used before all of
	// it is authenticated.
	chunkSize = 64 << 10
	saltSize  = 32
	lastChunk = 1 << 31 // in the length before a chunk
)

// Header is what a file tells without the cluster key.
type Header struct {
	TrustDomain string `json:"trust_domain"`
	// ClusterKey is the ID of the cluster key: it says which one, and nothing about
	// it.
	ClusterKey string    `json:"cluster_key"`
	Server     string    `json:"server,omitempty"` // which wrote it
	Version    string    `json:"version,omitempty"`
	Created    time.Time `json:"created"`
	// Position is the newest that the snapshot contains.
	Position store.Position `json:"position"`
	Salt     []byte         `json:"salt"`
}

// writer encrypts what is written to it. Close writes the end, without which the
// file is damaged; it does not close the writer below.
type writer struct {
	out   io.Writer
	sum   hash.Hash
	aead  cipher.AEAD
	plain []byte
	count uint64
	err   error
}

// newWriter writes the header and returns a writer for the rest.
func newWriter(out io.Writer, h Header, key ca.ClusterKey) (*writer, error) {
	h.Salt = make([]byte, saltSize)
	_, _ = rand.Read(h.Salt) // never fails: crypto/rand ends the program instead
	text, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("write a snapshot: encode its header: %w", err)
	}
	if len(text) > maxHeader {
		return nil, fmt.Errorf("write a snapshot: its header has %d bytes, at most %d", len(text), maxHeader)
	}
	head := append(binary.BigEndian.AppendUint32([]byte(magic), uint32(len(text))), text...) //nolint:gosec // at most maxHeader
	aead, err := fileCipher(key, h.Salt, head)
	if err != nil {
		return nil, err
	}
	w := &writer{out: out, sum: sha256.New(), aead: aead, plain: make([]byte, 0, chunkSize)}
	w.raw(head)
	return w, w.err
}

// Write implements io.Writer.
func (w *writer) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 && w.err == nil {
		if len(w.plain) == chunkSize {
			w.seal(0)
		}
		take := min(chunkSize-len(w.plain), len(b))
		w.plain, b = append(w.plain, b[:take]...), b[take:]
	}
	if w.err != nil {
		return 0, w.err
	}
	return n, nil
}

// Close writes the last chunk and the checksum.
func (w *writer) Close() error {
	w.seal(lastChunk)
	if w.err == nil {
		_, w.err = w.out.Write(w.sum.Sum(nil))
	}
	return w.err
}

func (w *writer) seal(flag uint32) {
	size := uint32(len(w.plain) + w.aead.Overhead()) //nolint:gosec // at most a chunk
	chunk := binary.BigEndian.AppendUint32(make([]byte, 0, 4+size), size|flag)
	w.raw(w.aead.Seal(chunk, nonce(w.aead, w.count, flag != 0), w.plain, nil)) //nolint:gosec // a nonce is used once: the key is the file's own
	w.plain, w.count = w.plain[:0], w.count+1
}

func (w *writer) raw(b []byte) {
	if w.err == nil {
		w.sum.Write(b)
		_, w.err = w.out.Write(b)
	}
}

// nonce is the chunk's number and whether it is the last: unique under the key of
// one file.
func nonce(aead cipher.AEAD, count uint64, last bool) []byte {
	n := make([]byte, aead.NonceSize())
	binary.BigEndian.PutUint64(n[3:], count)
	if last {
		n[len(n)-1] = 1
	}
	return n
}

func fileCipher(key ca.ClusterKey, salt, head []byte) (cipher.AEAD, error) {
	secret, err := key.Derive("snapshot")
	if err != nil {
		return nil, err //nolint:wrapcheck // says what was tried
	}
	sum := sha256.Sum256(head)
	subkey, err := hkdf.Key(sha256.New, secret.Reveal(), salt, "meshd snapshot 1 "+string(sum[:]), 32)
	if err != nil {
		return nil, fmt.Errorf("derive the key of a snapshot: %w", err)
	}
	block, err := aes.NewCipher(subkey)
	if err != nil {
		return nil, fmt.Errorf("derive the key of a snapshot: %w", err)
	}
	return cipher.NewGCM(block) //nolint:wrapcheck // fails for no key of this length
}

// chunks takes a file apart without decrypting it.
type chunks struct {
	in     *bufio.Reader
	sum    hash.Hash
	head   []byte
	header Header
	size   int64 // bytes read
	count  uint64
	ended  bool
}

func openChunks(r io.Reader) (*chunks, error) {
	c := &chunks{in: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	start := make([]byte, len(magic)+4)
	if err := c.read(start); err != nil {
		return nil, fmt.Errorf("%w: it ends after %d bytes", ErrFormat, c.size)
	}
	if !bytes.HasPrefix(start, []byte(magic)) {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrFormat, magic[:len(magic)-1])
	}
	n := binary.BigEndian.Uint32(start[len(magic):])
	if n > maxHeader {
		return nil, fmt.Errorf("%w: a header of %d bytes", ErrDamaged, n)
	}
	text := make([]byte, n)
	if err := c.read(text); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &c.header); err != nil {
		return nil, fmt.Errorf("%w: its header: %w", ErrDamaged, err)
	}
	c.head = append(start, text...)
	return c, nil
}

// next returns the next chunk, encrypted, and whether it is the last; io.EOF after
// that, if the checksum is right and nothing follows.
func (c *chunks) next() (chunk []byte, last bool, err error) {
	if c.ended {
		return nil, false, c.finish()
	}
	var word [4]byte
	if err := c.read(word[:]); err != nil {
		return nil, false, err
	}
	n := binary.BigEndian.Uint32(word[:])
	last, n = n&lastChunk != 0, n&^lastChunk
	const full = chunkSize + 16 // with the tag
	if n > full || !last && n != full {
		return nil, false, fmt.Errorf("%w: chunk %d has %d bytes", ErrDamaged, c.count, n)
	}
	chunk = make([]byte, n)
	if err := c.read(chunk); err != nil {
		return nil, false, err
	}
	c.count++
	c.ended = last
	return chunk, last, nil
}

func (c *chunks) finish() error {
	want, have := c.sum.Sum(nil), make([]byte, sha256.Size)
	if err := c.read(have); err != nil {
		return err
	}
	if !bytes.Equal(want, have) {
		return fmt.Errorf("%w: its checksum is %x, computed %x", ErrDamaged, have, want)
	}
	if _, err := c.in.ReadByte(); err == nil {
		return fmt.Errorf("%w: bytes follow its end", ErrDamaged)
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	return io.EOF
}

func (c *chunks) read(b []byte) error {
	n, err := io.ReadFull(c.in, b)
	c.size += int64(n)
	c.sum.Write(b[:n])
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it ends after %d bytes, it was cut off", ErrDamaged, c.size)
	default:
		return fmt.Errorf("read a snapshot: %w", err)
	}
}

// reader decrypts a file. Its io.EOF says that the whole file is intact.
type reader struct {
	*chunks
	aead  cipher.AEAD
	plain []byte
	err   error
}

func newReader(r io.Reader, key ca.ClusterKey) (*reader, error) {
	c, err := openChunks(r)
	if err != nil {
		return nil, err
	}
	id, err := key.ID()
	if err != nil {
		return nil, err //nolint:wrapcheck // says what was tried
	}
	if c.header.ClusterKey != id {
		return nil, fmt.Errorf("%w: it is encrypted under cluster key %s, this one is %s", ErrForeign, c.header.ClusterKey, id)
	}
	aead, err := fileCipher(key, c.header.Salt, c.head)
	if err != nil {
		return nil, err
	}
	return &reader{chunks: c, aead: aead}, nil
}

// Read implements io.Reader. Its first error sticks.
func (r *reader) Read(b []byte) (int, error) {
	for len(r.plain) == 0 && r.err == nil {
		chunk, last, err := r.next()
		if err != nil {
			r.err = err
			break
		}
		number := r.count - 1
		if r.plain, err = r.aead.Open(chunk[:0], nonce(r.aead, number, last), chunk, nil); err != nil {
			r.err = fmt.Errorf("%w: chunk %d, or the header, was changed or moved", ErrDamaged, number)
		}
	}
	if r.err != nil {
		return 0, r.err
	}
	n := copy(b, r.plain)
	r.plain = r.plain[n:]
	return n, nil
}
