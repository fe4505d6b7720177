package store

import (
	"hash/maphash"
	"iter"
)

// tree is an immutable ordered map: every change returns a new tree that shares
// what did not change, in O(log n) time and memory. It is a treap (Seidel and
// Aragon, "Randomized Search Trees", 1996) whose priorities are a keyed hash of
// the key, so that no choice of keys can unbalance it. Its shape differs from
// process to process; its content and order do not.
type tree[K comparable, V any] struct {
	root *node[K, V]
	size int
	cmp  func(K, K) int
	seed maphash.Seed
}

type node[K comparable, V any] struct {
	key         K
	value       V
	priority    uint64
	left, right *node[K, V]
}

func newTree[K comparable, V any](cmp func(K, K) int) tree[K, V] {
	return tree[K, V]{cmp: cmp, seed: maphash.MakeSeed()}
}

// cleared returns an empty tree of the same kind.
func (t tree[K, V]) cleared() tree[K, V] {
	t.root, t.size = nil, 0
	return t
}

func (t tree[K, V]) get(key K) (V, bool) {
	for n := t.root; n != nil; {
		switch c := t.cmp(key, n.key); {
		case c == 0:
			return n.value, true
		case c < 0:
			n = n.left
		default:
			n = n.right
		}
	}
	var zero V
	return zero, false
}

func (t tree[K, V]) put(key K, value V) tree[K, V] {
	added := true
	t.root = t.insert(t.root, &node[K, V]{key: key, value: value, priority: maphash.Comparable(t.seed, key)}, &added)
	if added {
		t.size++
	}
	return t
}

func (t tree[K, V]) insert(at, add *node[K, V], added *bool) *node[K, V] {
	if at == nil {
		return add
	}
	c := t.cmp(add.key, at.key)
	if c == 0 {
		*added = false
		n := *at
		n.value = add.value
		return &n
	}
	// An equal key has an equal priority, so above it there is no split.
	if add.priority > at.priority {
		add.left, add.right = t.split(at, add.key)
		return add
	}
	n := *at
	if c < 0 {
		n.left = t.insert(at.left, add, added)
	} else {
		n.right = t.insert(at.right, add, added)
	}
	return &n
}

// split divides the nodes under at by key, which is not among them.
func (t tree[K, V]) split(at *node[K, V], key K) (less, more *node[K, V]) {
	if at == nil {
		return nil, nil
	}
	n := *at
	if t.cmp(at.key, key) < 0 {
		n.right, more = t.split(at.right, key)
		return &n, more
	}
	less, n.left = t.split(at.left, key)
	return less, &n
}

func (t tree[K, V]) remove(key K) tree[K, V] {
	if _, ok := t.get(key); !ok {
		return t
	}
	t.root = t.cut(t.root, key)
	t.size--
	return t
}

func (t tree[K, V]) cut(at *node[K, V], key K) *node[K, V] {
	c := t.cmp(key, at.key)
	if c == 0 {
		return merge(at.left, at.right)
	}
	n := *at
	if c < 0 {
		n.left = t.cut(at.left, key)
	} else {
		n.right = t.cut(at.right, key)
	}
	return &n
}

// merge joins two trees, all keys of the first below all of the second.
func merge[K comparable, V any](less, more *node[K, V]) *node[K, V] {
	switch {
	case less == nil:
		return more
	case more == nil:
		return less
	case less.priority > more.priority:
		n := *less
		n.right = merge(less.right, more)
		return &n
	default:
		n := *more
		n.left = merge(less, more.left)
		return &n
	}
}

// from yields the keys that are not below start, in order.
func (t tree[K, V]) from(start K) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { t.walk(t.root, start, yield) }
}

func (t tree[K, V]) walk(at *node[K, V], start K, yield func(K, V) bool) bool {
	if at == nil {
		return true
	}
	if t.cmp(at.key, start) < 0 {
		return t.walk(at.right, start, yield)
	}
	return t.walk(at.left, start, yield) && yield(at.key, at.value) && t.walk(at.right, start, yield)
}
