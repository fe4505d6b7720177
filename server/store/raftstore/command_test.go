package raftstore_test

import (
	"bytes"
	"testing"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

func entries() [][]byte {
	gen := store.NewGeneration()
	return raftstore.Encoded(raftstore.Command{
		Generation: gen,
		Holder:     "server-1",
		Epoch:      300,
		From:       store.Position{Generation: gen, Revision: 1 << 40},
		Txn: store.Txn{
			Generation: gen,
			Leader:     true,
			Checks:     []store.Check{{Key: "a", ModRevision: 7}, {Key: "b"}},
			Ops:        []store.Op{{Key: "c", Value: []byte("value")}, {Key: "d", Delete: true}, {Key: "e"}},
		},
	})
}

func TestCommandsRoundTrip(t *testing.T) {
	for _, entry := range entries() {
		again, err := raftstore.Recode(entry)
		if err != nil || !bytes.Equal(again, entry) {
			t.Errorf("kind %d: %x became %x, %v", entry[0], entry, again, err)
		}
		for cut := range entry {
			if _, err := raftstore.Recode(entry[:cut]); err == nil {
				t.Errorf("kind %d: %d of %d bytes are taken for an entry", entry[0], cut, len(entry))
			}
		}
		if _, err := raftstore.Recode(append(bytes.Clone(entry), 0)); err == nil {
			t.Errorf("kind %d: a byte behind the entry is ignored", entry[0])
		}
	}
	if _, err := raftstore.Recode([]byte{0xee}); err == nil {
		t.Error("an unknown kind is taken for an entry")
	}
}

// What decodes must encode to something that decodes to the same: members of
// different history must not read one entry in two ways.
func FuzzCommand(f *testing.F) {
	for _, entry := range entries() {
		f.Add(entry)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		once, err := raftstore.Recode(b)
		if err != nil {
			return
		}
		twice, err := raftstore.Recode(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x decodes to %x, that to %x, %v", b, once, twice, err)
		}
	})
}
