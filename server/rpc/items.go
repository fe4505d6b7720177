package rpc

import "bytes"

// maxTombstones is how many deletions a set remembers. Who is further behind
// gets the whole set anew.
const maxTombstones = 1024

// item is one value of a topic. It is immutable but for its place in the list.
type item struct {
	key        string
	json       []byte // nil: deleted
	revision   uint64
	seq        uint64
	prev, next *item
}

// itemset is a slice of the catalog as topics show it, shared by all who are
// subscribed to it: a reader remembers one number, and what changed since is at
// the end of the list. So a change costs what changed, not what there is, and a
// slow reader costs no memory.
type itemset struct {
	items      map[string]*item
	first      item // sentinel of a ring in the order of seq
	seq        uint64
	floor      uint64  // changes up to here may be forgotten
	tombstones []*item // oldest first
	subs       map[*subscription]struct{}
}

func newItemset() *itemset {
	s := &itemset{items: make(map[string]*item), subs: make(map[*subscription]struct{})}
	s.first.prev, s.first.next = &s.first, &s.first
	return s
}

// put writes a value; nothing happens if it is there already. It reports whether
// something changed.
func (s *itemset) put(key string, json []byte, revision uint64) bool {
	old, ok := s.items[key]
	if ok && old.json != nil && old.revision == revision && bytes.Equal(old.json, json) {
		return false
	}
	if json == nil {
		json = []byte{}
	}
	s.append(old, &item{key: key, json: json, revision: revision})
	return true
}

// drop deletes a value, and reports whether there was one.
func (s *itemset) drop(key string, revision uint64) bool {
	old, ok := s.items[key]
	if !ok || old.json == nil {
		return false
	}
	dead := &item{key: key, revision: revision}
	s.append(old, dead)
	s.tombstones = append(s.tombstones, dead)
	if len(s.tombstones) > maxTombstones {
		oldest := s.tombstones[0]
		s.tombstones = s.tombstones[1:]
		s.floor = max(s.floor, oldest.seq)
		if s.items[oldest.key] == oldest {
			unlink(oldest)
			delete(s.items, oldest.key)
		}
	}
	return true
}

func (s *itemset) append(old, it *item) {
	if old != nil {
		unlink(old)
	}
	s.seq++
	it.seq = s.seq
	it.prev, it.next = s.first.prev, &s.first
	it.prev.next, it.next.prev = it, it
	s.items[it.key] = it
}

func unlink(it *item) { it.prev.next, it.next.prev = it.next, it.prev }

// get returns a value, nil if there is none.
func (s *itemset) get(key string) *item {
	it, ok := s.items[key]
	if !ok || it.json == nil {
		return nil
	}
	return it
}

// all yields the values, those written last at the end.
func (s *itemset) all(yield func(*item) bool) {
	for it := s.first.next; it != &s.first; it = it.next {
		if it.json != nil && !yield(it) {
			return
		}
	}
}

// since yields what changed after cursor, deletions included, newest first. The
// cursor must not be below the floor.
func (s *itemset) since(cursor uint64) func(yield func(*item) bool) {
	return func(yield func(*item) bool) {
		for it := s.first.prev; it != &s.first && it.seq > cursor; it = it.prev {
			if !yield(it) {
				return
			}
		}
	}
}

// refill makes the set hold exactly what fill puts, and reports whether anything
// changed.
func (s *itemset) refill(revision uint64, fill func(put func(key string, json []byte, revision uint64))) bool {
	changed := false
	seen := make(map[string]bool)
	fill(func(key string, json []byte, revision uint64) {
		seen[key] = true
		changed = s.put(key, json, revision) || changed
	})
	var gone []string
	for it := range s.all {
		if !seen[it.key] {
			gone = append(gone, it.key)
		}
	}
	for _, key := range gone {
		changed = s.drop(key, revision) || changed
	}
	return changed
}
