package feed

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"

	"github.com/meshd/meshd/ca"
)

// keyOf returns the form of a leaf that travels.
func keyOf(leaf *ca.Leaf) (Key, error) {
	der, err := leaf.KeyDER()
	if err != nil {
		return Key{}, fmt.Errorf("pass a leaf on: %w", err)
	}
	return Key{ID: leaf.ID(), Chain: leaf.Chain().DER(), Key: der.Reveal()}, nil
}

// leaf reads a key that came from outside.
func (k Key) leaf() (*ca.Leaf, error) {
	leaf, err := ca.ParseLeaf(k.Chain, ca.NewSecret(k.Key))
	if err != nil {
		return nil, fmt.Errorf("%w: key of %s: %w", ErrFrame, k.ID, err)
	}
	if leaf.ID() != k.ID {
		return nil, fmt.Errorf("%w: key of %s names %s", ErrFrame, k.ID, leaf.ID())
	}
	return leaf, nil
}

// hash identifies the chain, and so the key.
func (k Key) hash() string {
	sum := sha256.New()
	for _, der := range k.Chain {
		sum.Write(append(strconv.AppendInt(nil, int64(len(der)), 10), ':'))
		sum.Write(der)
	}
	return base64.RawURLEncoding.EncodeToString(sum.Sum(nil))
}
