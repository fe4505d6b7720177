package raftstore_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/types"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

func state() types.PersistentState {
	return types.PersistentState{NextSegmentID: 3, Segments: []types.SegmentInfo{{ID: 2, BaseIndex: 7, MinIndex: 9, SizeLimit: 1 << 20}}}
}

// What was written is there after a restart, whole: files of the log, term, vote.
func TestMeta(t *testing.T) {
	dir := t.TempDir()
	m := raftstore.NewMeta()
	if have, err := m.Load(dir); err != nil || !cmp.Equal(have, types.PersistentState{}) {
		t.Fatalf("an empty directory: %v, %v", have, err)
	}
	if v, err := m.GetStable([]byte("CurrentTerm")); v != nil || err != nil {
		t.Fatalf("a key that was never set: %q, %v", v, err)
	}
	if err := errors.Join(m.SetStable([]byte("CurrentTerm"), []byte{7}), m.CommitState(state()),
		m.SetStable([]byte("LastVoteCand"), []byte("a")), m.SetStable([]byte("LastVoteCand"), nil), m.Close()); err != nil {
		t.Fatal(err)
	}
	again := raftstore.NewMeta()
	if have, err := again.Load(dir); err != nil || !cmp.Equal(have, state()) {
		t.Fatalf("after a restart: %v, %v", have, err)
	}
	for key, want := range map[string][]byte{"CurrentTerm": {7}, "LastVoteCand": nil} {
		if have, err := again.GetStable([]byte(key)); err != nil || !cmp.Equal(have, want) {
			t.Errorf("%s after a restart: %q, %v", key, have, err)
		}
	}
}

// Every flipped bit, every shorter and every longer file is found.
func TestMetaDamage(t *testing.T) {
	dir := t.TempDir()
	m := raftstore.NewMeta()
	_, err := m.Load(dir)
	if err := errors.Join(err, m.SetStable([]byte("CurrentTerm"), []byte{7}), m.CommitState(state())); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, "meta"))
	if err != nil {
		t.Fatal(err)
	}
	if err := raftstore.DecodeMeta(whole); err != nil {
		t.Fatal(err)
	}
	for at := range whole {
		for bit := range 8 {
			whole[at] ^= 1 << bit
			if err := raftstore.DecodeMeta(whole); !errors.Is(err, store.ErrCorrupt) {
				t.Errorf("bit %d of byte %d: %v", bit, at, err)
			}
			whole[at] ^= 1 << bit
		}
		if err := raftstore.DecodeMeta(whole[:at]); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", at, err)
		}
	}
	if err := raftstore.DecodeMeta(append(whole, ' ')); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("with a byte more: %v", err)
	}
}

// A log whose description is gone is not taken for an empty one.
func TestMetaMissing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "00000000000000000001-0000000000000001.wal"), []byte("entries"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := raftstore.NewMeta().Load(dir); !errors.Is(err, store.ErrCorrupt) {
		t.Fatal(err)
	}
}

// What an earlier version kept in a database is taken over, once.
func TestMetaOfEarlierVersion(t *testing.T) {
	dir := t.TempDir()
	var old metadb.BoltMetaDB
	_, err := old.Load(dir)
	if err := errors.Join(err, old.CommitState(state()), old.SetStable([]byte("CurrentTerm"), []byte{5}),
		old.SetStable([]byte("LastVoteTerm"), []byte{4}), old.SetStable([]byte("LastVoteCand"), []byte("server-2")), old.Close()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m := raftstore.NewMeta()
		if have, err := m.Load(dir); err != nil || !cmp.Equal(have, state()) {
			t.Fatalf("%v, %v", have, err)
		}
		for key, want := range map[string]string{"CurrentTerm": "\x05", "LastVoteTerm": "\x04", "LastVoteCand": "server-2"} {
			if have, err := m.GetStable([]byte(key)); err != nil || string(have) != want {
				t.Errorf("%s: %q, %v", key, have, err)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, metadb.FileName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the database is still there: %v", err)
		}
	}
}

// A crash between the two writes of a founding costs nothing: it is done again.
func TestFoundingInterrupted(t *testing.T) {
	cfg := small(filepath.Join(t.TempDir(), "state"))
	if err := errors.Join(os.Mkdir(cfg.Dir, 0o700), os.Mkdir(filepath.Join(cfg.Dir, "wal"), 0o700)); err != nil {
		t.Fatal(err)
	}
	m := raftstore.NewMeta()
	_, err := m.Load(filepath.Join(cfg.Dir, "wal"))
	if err := errors.Join(err, m.SetStable([]byte("CurrentTerm"), []byte{1, 0, 0, 0, 0, 0, 0, 0})); err != nil {
		t.Fatal(err)
	}
	serving(t, run(t, cfg))
}

func FuzzDecodeMeta(f *testing.F) {
	f.Add([]byte("meshd-log-meta 1 00000000\n{}"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := raftstore.DecodeMeta(b); err != nil && !errors.Is(err, store.ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
