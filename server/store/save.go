package store

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/meshd/meshd/server/fault"
)

const spaceMagic = "meshd space 1\n"

// Records of a saved Space.
const (
	recordEnd = iota
	recordPair
	recordDeletion
	recordStaged
)

// maxHolder bounds the name of a leader.
const maxHolder = 256

// Saved is an immutable state of a Space, taken in constant time.
type Saved struct{ version *version }

// Save returns the newest state. Later changes of s do not show in it.
func (s *Space) Save() Saved { return Saved{version: s.now.Load()} }

// Position returns the position of the saved state.
func (d Saved) Position() Position { return d.version.position() }

// WriteTo writes everything that a member needs to continue from here:
// remembered deletions, the stage and the leader's claim included. Members that
// applied the same changes write the same bytes.
func (d Saved) WriteTo(w io.Writer) (int64, error) {
	return d.write(w, fault.Bug(fault.LoseLastSnapshotEntry))
}

// write is WriteTo, or with lossy the planted bug LoseLastSnapshotEntry.
func (d Saved) write(w io.Writer, lossy bool) (int64, error) {
	v := d.version
	count := &countWriter{w: w}
	f := newFrameWriter(count, spaceMagic)
	f.text(v.generation)
	f.number(v.head)
	f.number(v.revision)
	f.number(v.floor)
	f.text(v.lead.Holder)
	f.number(v.lead.Epoch)
	f.text(v.open)
	for _, e := range v.keys.from("") {
		if lossy && e.pair.ModRevision == v.head {
			continue
		}
		if e.deleted {
			f.number(recordDeletion)
			f.text(e.pair.Key)
			f.number(e.pair.ModRevision)
			continue
		}
		f.pair(recordPair, e.pair)
	}
	for _, e := range v.tent.from("") {
		f.pair(recordStaged, e.pair)
	}
	f.number(recordEnd)
	err := f.finish()
	return count.n, err
}

func (f *frameWriter) pair(record uint64, p Pair) {
	f.number(record)
	f.text(p.Key)
	f.blob(p.Value)
	f.number(p.ModRevision)
}

type countWriter struct {
	w io.Writer
	n int64
}

// Write implements io.Writer.
func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// Hash returns the SHA-256 of what WriteTo writes. Members at the same point of
// the same history have equal hashes.
func (d Saved) Hash() [sha256.Size]byte {
	h := sha256.New()
	_, _ = d.write(h, false) // a hash never fails to write
	return [sha256.Size]byte(h.Sum(nil))
}

// Load replaces the whole state by one that WriteTo wrote. After an error, which
// is ErrCorrupt for bytes that WriteTo can't have written, s is as before.
// Watchers continue, with a Reset if they have to.
func (s *Space) Load(r io.Reader) error {
	f := newFrameReader(r, spaceMagic)
	v := *NewSpace().now.Load()
	v.generation = f.generation()
	v.head, v.revision, v.floor = f.number(), f.number(), f.number()
	v.lead = Leader{Holder: string(f.blob(maxHolder)), Epoch: f.number()}
	v.open = f.generation()
	if v.head > v.revision || v.floor > v.head {
		f.fail(fmt.Errorf("revisions %d, %d, %d are out of order", v.floor, v.head, v.revision))
	}
	for f.err == nil && v.loadRecord(f) {
	}
	if err := f.finish(); err != nil {
		return fmt.Errorf("read a saved state: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.publish(v)
	return nil
}

// loadRecord reads one record into v and reports whether more follow.
func (v *version) loadRecord(f *frameReader) bool {
	kind := f.number()
	if f.err != nil || kind == recordEnd {
		return false
	}
	e := &entry{deleted: kind == recordDeletion}
	e.pair.Key = f.key()
	switch kind {
	case recordPair, recordStaged:
		e.pair.Value = f.blob(MaxBytes)
	case recordDeletion:
		v.gone++
	default:
		f.fail(fmt.Errorf("unknown record %d", kind))
	}
	e.pair.ModRevision = f.number()
	into, limit := &v.keys, v.head
	if kind == recordStaged {
		into, limit = &v.tent, v.revision
	}
	_, twice := into.get(e.pair.Key)
	if twice || e.pair.ModRevision == 0 || e.pair.ModRevision > limit || (e.deleted && e.pair.ModRevision <= v.floor) {
		f.fail(fmt.Errorf("key %q at revision %d does not fit", e.pair.Key, e.pair.ModRevision))
	}
	if f.err != nil {
		return false
	}
	*into = into.put(e.pair.Key, e)
	if kind != recordStaged && e.pair.ModRevision > v.floor {
		v.log = v.log.put(change{revision: e.pair.ModRevision, key: e.pair.Key}, e)
	}
	return true
}
