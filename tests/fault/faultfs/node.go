package faultfs

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pageSize   = 4096
	sectorSize = 512
)

// A node has two sides.
const (
	live = iota // as programs see it
	disk        // as it is after a power loss
)

type page [pageSize]byte

// image is a file's content. A page that is missing holds zeros.
type image struct {
	size  int64
	pages map[int64]*page
}

// node is a file, a folder, or something else that has a name.
type node struct {
	id       uint64
	mode     uint32 // with the type
	uid, gid uint32
	changed  time.Time
	lookups  uint64 // of the kernel
	linked   bool   // in a folder, on either side

	image    [2]image
	dirty    map[int64]struct{} // pages that the next sync writes
	resized  bool               // the next sync writes the size
	reserved int64              // pages that fallocate has taken from the disk

	entries [2]map[string]*node // of a folder
}

// change is what a folder's sync brings to the disk: names that were set or, if
// the node is nil, removed. A rename has both, in one or two folders.
type change struct {
	sets []entry
}

type entry struct {
	dir  *node
	name string
	node *node
}

func (c change) apply(side int) {
	for _, e := range c.sets {
		if e.node == nil {
			delete(e.dir.entries[side], e.name)
		} else {
			e.dir.entries[side][e.name] = e.node
		}
	}
}

func (c change) touches(dir *node) bool {
	return slices.ContainsFunc(c.sets, func(e entry) bool { return e.dir == dir })
}

func (f *FS) newNode(mode, uid, gid uint32) *node {
	n := &node{id: f.next, mode: mode, uid: uid, gid: gid, changed: time.Now(), dirty: map[int64]struct{}{}}
	f.next++
	for side := range n.image {
		n.image[side].pages = map[int64]*page{}
		if n.isDir() {
			n.entries[side] = map[string]*node{}
		}
	}
	f.nodes[n.id] = n
	return n
}

func (n *node) isDir() bool { return n.mode&unix.S_IFMT == unix.S_IFDIR }

// enter makes a change that programs see at once and the disk after a sync.
func (f *FS) enter(sets ...entry) {
	c := change{sets: sets}
	c.apply(live)
	f.journal = append(f.journal, c)
	for _, e := range sets {
		e.dir.changed = time.Now()
		if e.node != nil {
			e.node.linked = true
		}
	}
}

// syncDir brings the entries of a folder to the disk.
func (f *FS) syncDir(dir *node) {
	rest := f.journal[:0:0]
	for _, c := range f.journal {
		if c.touches(dir) {
			c.apply(disk)
		} else {
			rest = append(rest, c)
		}
	}
	f.journal = rest
	f.relink()
}

// relink finds out which nodes still have a name, and drops the others.
func (f *FS) relink() {
	for _, n := range f.nodes {
		n.linked = false
	}
	for _, n := range f.nodes {
		for side := range n.entries {
			for _, child := range n.entries[side] {
				child.linked = true
			}
		}
	}
	for _, c := range f.journal { // a change that is pending may give a name back
		for _, e := range c.sets {
			e.dir.linked = true
			if e.node != nil {
				e.node.linked = true
			}
		}
	}
	for id, n := range f.nodes {
		if !n.linked && n.lookups == 0 && n != f.root {
			delete(f.nodes, id)
		}
	}
}

// used is how many pages of the disk are taken: by what has a name or is open.
func (f *FS) used() int64 {
	named := map[*node]bool{f.root: true}
	for _, n := range f.nodes {
		for _, child := range n.entries[live] {
			named[child] = true
		}
	}
	total := int64(0)
	for _, n := range f.nodes {
		if named[n] || n.lookups > 0 {
			total += n.pages()
		}
	}
	return total
}

func (n *node) pages() int64 {
	total := n.reserved + 1 // what describes it
	for at := range n.image[live].pages {
		if at >= n.reserved {
			total++
		}
	}
	return total
}

// room reports whether the disk has n more pages.
func (f *FS) room(n int64) bool {
	if f.faults.Capacity == 0 || n <= 0 || f.used()+n <= f.faults.Capacity/pageSize {
		return true
	}
	f.stats.Full++
	return false
}

// missing counts the pages that a write takes from the disk.
func (n *node) missing(offset, length int64) int64 {
	total := int64(0)
	for at := offset / pageSize; at*pageSize < offset+length; at++ {
		if _, ok := n.image[live].pages[at]; !ok && at >= n.reserved {
			total++
		}
	}
	return total
}

func (n *node) write(data []byte, offset int64) {
	now := &n.image[live]
	for len(data) > 0 {
		at, within := offset/pageSize, offset%pageSize
		p, ok := now.pages[at]
		if !ok {
			p = new(page)
			now.pages[at] = p
		}
		done := copy(p[within:], data)
		n.dirty[at] = struct{}{}
		data, offset = data[done:], offset+int64(done)
	}
	if offset > now.size {
		now.size, n.resized = offset, true
	}
	n.changed = time.Now()
}

func (n *node) read(to []byte, offset int64) int {
	now := n.image[live]
	if offset >= now.size {
		return 0
	}
	to = to[:min(int64(len(to)), now.size-offset)]
	for rest := to; len(rest) > 0; {
		at, within := offset/pageSize, offset%pageSize
		length := min(len(rest), int(pageSize-within))
		if p, ok := now.pages[at]; ok {
			copy(rest[:length], p[within:])
		} else {
			clear(rest[:length])
		}
		rest, offset = rest[length:], offset+int64(length)
	}
	return len(to)
}

func (n *node) resize(size int64) {
	now := &n.image[live]
	if size < now.size {
		for at, p := range now.pages {
			switch begin := at * pageSize; {
			case begin >= size:
				delete(now.pages, at)
				n.dirty[at] = struct{}{}
			case begin+pageSize > size:
				clear(p[size-begin:])
				n.dirty[at] = struct{}{}
			}
		}
		n.reserved = min(n.reserved, (size+pageSize-1)/pageSize)
	}
	now.size, n.resized, n.changed = size, true, time.Now()
}

// sync brings the content to the disk.
func (n *node) sync() {
	for at := range n.dirty {
		if p, ok := n.image[live].pages[at]; ok {
			written := *p
			n.image[disk].pages[at] = &written
		} else {
			delete(n.image[disk].pages, at)
		}
	}
	if n.resized {
		n.image[disk].size = n.image[live].size
	}
	n.clean()
}

// clean forgets what should be synced, as Linux does after a failed sync.
func (n *node) clean() {
	n.dirty = map[int64]struct{}{}
	n.resized = false
}

// lose replaces what programs saw by what a power loss leaves, and returns how
// many sectors differ.
func (n *node) lose(loss Loss, rnd *rand.Rand) int {
	if n.isDir() {
		n.entries[live] = maps.Clone(n.entries[disk])
		return 0
	}
	seen := n.image[live]
	left := image{size: n.image[disk].size, pages: maps.Clone(n.image[disk].pages)}
	if n.resized && loss != Drop {
		low, high := min(left.size, seen.size), max(left.size, seen.size)
		left.size = low + rnd.Int64N(high-low+1)
	}
	for _, at := range sortedKeys(n.dirty) {
		if p := torn(left.pages[at], seen.pages[at], loss, rnd); p != nil {
			left.pages[at] = p
		}
	}
	for at, p := range left.pages { // nothing is beyond the end
		if begin := at * pageSize; begin >= left.size {
			delete(left.pages, at)
		} else if begin+pageSize > left.size {
			clear(p[left.size-begin:])
		}
	}
	lost := differ(seen, left)
	n.image[live] = left
	n.image[disk] = image{size: left.size, pages: map[int64]*page{}}
	for at, p := range left.pages {
		written := *p
		n.image[disk].pages[at] = &written
	}
	n.reserved = min(n.reserved, (left.size+pageSize-1)/pageSize)
	n.clean()
	return lost
}

// torn mixes the sectors of a page that was being replaced. It returns nil if the
// old page stays.
func torn(was, is *page, loss Loss, rnd *rand.Rand) *page {
	if loss == Drop {
		return nil
	}
	mixed, wanted := page{}, page{}
	if was != nil {
		mixed = *was
	}
	if is != nil {
		wanted = *is
	}
	for at := 0; at < pageSize; at += sectorSize {
		into, from := mixed[at:at+sectorSize], wanted[at:at+sectorSize]
		if bytes.Equal(into, from) {
			continue
		}
		switch choice := rnd.IntN(3); {
		case choice == 0:
			copy(into, from)
		case choice == 1 && loss == Garble:
			for i := range into { // what stays as it was is not touched
				if into[i] != from[i] {
					into[i] = byte(rnd.Uint32())
				}
			}
		}
	}
	return &mixed
}

// differ counts the sectors in which two images differ.
func differ(a, b image) int {
	total := 0
	var zero page
	pages := maps.Clone(a.pages)
	maps.Copy(pages, b.pages)
	for at := range pages {
		x, y := a.pages[at], b.pages[at]
		if x == nil {
			x = &zero
		}
		if y == nil {
			y = &zero
		}
		for i := 0; i < pageSize; i += sectorSize {
			if !bytes.Equal(x[i:i+sectorSize], y[i:i+sectorSize]) {
				total++
			}
		}
	}
	return total
}

func sortedKeys[K interface{ ~int64 | ~string }, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
}
