package backup_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/store"
)

const canary = "canary-3f9a1c"

var taken = time.Date(2026, 11, 22, 2, 47, 12, 0, time.UTC)

func cluster() backup.Cluster {
	return backup.Cluster{TrustDomain: "mesh.test", Key: ca.GenerateClusterKey(), Server: "s1", Version: "1.2.3"}
}

// engine returns a store with n nodes, each with a value of size bytes.
func engine(tb testing.TB, n, size int) store.Engine {
	tb.Helper()
	e := store.NewMemory()
	tb.Cleanup(func() { _ = e.Close() })
	for i := range n {
		put(tb, e, fmt.Sprintf("node/vm-%03d", i), canary+strings.Repeat("x", size))
	}
	return e
}

func put(tb testing.TB, e store.Engine, key, value string) {
	tb.Helper()
	if _, err := e.Commit(tb.Context(), store.Txn{Ops: []store.Op{{Key: key, Value: []byte(value)}}}); err != nil {
		tb.Fatal(err)
	}
}

func remove(tb testing.TB, e store.Engine, key string) {
	tb.Helper()
	if _, err := e.Commit(tb.Context(), store.Txn{Ops: []store.Op{{Key: key, Delete: true}}}); err != nil {
		tb.Fatal(err)
	}
}

func save(tb testing.TB, e store.Engine, c backup.Cluster) []byte {
	tb.Helper()
	var file bytes.Buffer
	if _, err := backup.Save(tb.Context(), &file, e, c, taken); err != nil {
		tb.Fatal(err)
	}
	return file.Bytes()
}

func content(tb testing.TB, e store.Engine) map[string]string {
	tb.Helper()
	all, err := e.List(tb.Context(), "")
	if err != nil {
		tb.Fatal(err)
	}
	out := map[string]string{}
	for _, p := range all.Pairs {
		out[p.Key] = string(p.Value)
	}
	return out
}

func TestRestoreGivesBackWhatWasSaved(t *testing.T) {
	t.Parallel()
	c := cluster()
	e := engine(t, 3, 10)
	put(t, e, "intention/a", "allow")
	put(t, e, "server/s1", "old address")
	file := save(t, e, c)
	want := content(t, e)

	remove(t, e, "intention/a")
	put(t, e, "node/vm-001", "changed")
	put(t, e, "token/late", "made later")
	put(t, e, "server/s1", "new address")
	put(t, e, "server/s2", "joined later")
	before, err := e.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ended := false
	got, err := backup.Restore(t.Context(), bytes.NewReader(file), e, c, backup.Policy{
		Keep:  func(key string) bool { return strings.HasPrefix(key, "server/") },
		Check: func(p store.Pair) error { ended = p.Key == ""; return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	want["server/s1"], want["server/s2"] = "new address", "joined later"
	if diff := cmp.Diff(want, content(t, e)); diff != "" {
		t.Errorf("the state (-want +got):\n%s", diff)
	}
	changes := []backup.Change{{Kind: "intention", Added: 1}, {Kind: "node", Changed: 1}, {Kind: "token", Removed: 1}}
	if diff := cmp.Diff(changes, got.Changes); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	if got.Before != before || got.After.Generation == before.Generation || !got.Header.Created.Equal(taken) || !ended {
		t.Errorf("restored %+v; before %v; the check saw the end: %v", got, before, ended)
	}
}

// Nobody reads a file without the key, but for its header.
func TestFileTellsItsHeaderOnly(t *testing.T) {
	t.Parallel()
	c := cluster()
	file := save(t, engine(t, 40, 4000), c)
	if bytes.Contains(file, []byte(canary)) || bytes.Contains(file, []byte("vm-0")) {
		t.Error("the state can be read in the file")
	}
	id, err := c.Key.ID()
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]ca.ClusterKey{"without the key": {}, "with the key": c.Key} {
		report, err := backup.Inspect(bytes.NewReader(file), key)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		h := report.Header
		if h.TrustDomain != "mesh.test" || h.ClusterKey != id || h.Server != "s1" || h.Version != "1.2.3" || !h.Created.Equal(taken) || h.Position.Revision != 41 {
			t.Errorf("%s: header %+v", name, h)
		}
		if report.Bytes != int64(len(file)) || report.Chunks < 3 || report.Verified == key.IsZero() {
			t.Errorf("%s: %+v, the file has %d bytes", name, report, len(file))
		}
		if want := []backup.Count{{Kind: "node", Records: 40}}; report.Verified && !cmp.Equal(report.Records, want) {
			t.Errorf("%s: records %+v", name, report.Records)
		}
	}
	if again := save(t, engine(t, 40, 4000), c); bytes.Equal(again[400:], file[400:]) {
		t.Error("two snapshots of the same state are alike")
	}
}

// A damaged file, or one that arrives in part, changes nothing.
func TestDamageIsRefusedAsAWhole(t *testing.T) {
	t.Parallel()
	c := cluster()
	e := engine(t, 40, 4000) // three chunks
	file := save(t, e, c)
	remove(t, e, "node/vm-007")
	want := content(t, e)
	position, err := e.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, r io.Reader, kinds ...error) {
		t.Helper()
		_, err := backup.Restore(t.Context(), r, e, c, backup.Policy{})
		if !slices.ContainsFunc(kinds, func(kind error) bool { return errors.Is(err, kind) }) {
			t.Errorf("%s: %v", what, err)
		}
		if now, err := e.Barrier(t.Context()); err != nil || now.Generation != position.Generation || !cmp.Equal(content(t, e), want) {
			t.Fatalf("%s: the state has changed; %v", what, err)
		}
	}
	const step = 37
	for n := 0; n < len(file); n += step {
		refused(fmt.Sprintf("cut to %d of %d bytes", n, len(file)), bytes.NewReader(file[:n]), backup.ErrDamaged, backup.ErrFormat)
	}
	for n := 0; n < len(file); n += 11 * step {
		bad := bytes.Clone(file)
		bad[n] ^= 0x20
		refused(fmt.Sprintf("byte %d flipped", n), bytes.NewReader(bad), backup.ErrDamaged, backup.ErrFormat, backup.ErrForeign)
	}
	broken := errors.New("connection reset")
	refused("connection lost", io.MultiReader(bytes.NewReader(file[:len(file)-100]), iotest.ErrReader(broken)), store.ErrCorrupt, backup.ErrDamaged, broken)
	refused("more behind it", io.MultiReader(bytes.NewReader(file), strings.NewReader("x")), backup.ErrDamaged)
	for name, f := range map[string]func([][]byte) [][]byte{
		"swapped":     func(c [][]byte) [][]byte { return [][]byte{c[1], c[0], c[2]} },
		"left out":    func(c [][]byte) [][]byte { return [][]byte{c[0], c[2]} },
		"repeated":    func(c [][]byte) [][]byte { return [][]byte{c[0], c[0], c[1], c[2]} },
		"without end": func(c [][]byte) [][]byte { return c[:2] },
		"end marked earlier": func(c [][]byte) [][]byte {
			first := bytes.Clone(c[0])
			first[0] |= 0x80
			return [][]byte{first}
		},
	} {
		refused("chunks "+name, bytes.NewReader(rechunk(t, file, f)), backup.ErrDamaged)
	}
	if _, err := backup.Restore(t.Context(), bytes.NewReader(file), e, c, backup.Policy{}); err != nil {
		t.Errorf("the intact file: %v", err)
	}
}

// rechunk changes the chunks of a file and computes its checksum anew, as someone
// without the key could.
func rechunk(tb testing.TB, file []byte, f func([][]byte) [][]byte) []byte {
	tb.Helper()
	const magic = len("meshd snapshot 1\n")
	head := magic + 4 + int(binary.BigEndian.Uint32(file[magic:]))
	var all [][]byte
	for rest := file[head : len(file)-sha256.Size]; len(rest) > 0; {
		n := 4 + int(binary.BigEndian.Uint32(rest)&^(1<<31))
		all = append(all, rest[:n])
		rest = rest[n:]
	}
	if len(all) != 3 {
		tb.Fatalf("%d chunks, the test wants 3", len(all))
	}
	out := slices.Concat(append([][]byte{file[:head]}, f(all)...)...)
	sum := sha256.Sum256(out)
	return append(out, sum[:]...)
}

func TestForeignSnapshotIsRefused(t *testing.T) {
	t.Parallel()
	ours := cluster()
	e := engine(t, 2, 10)
	other := ours
	other.TrustDomain = "other.test"
	refuse := errors.New("too new")
	for name, row := range map[string]struct {
		by    backup.Cluster
		check func(store.Pair) error
		want  error
	}{
		"another key":          {cluster(), nil, backup.ErrForeign},
		"another trust domain": {other, nil, backup.ErrForeign},
		"a record":             {ours, func(p store.Pair) error { return onKey(p, "node/vm-001", refuse) }, refuse},
		"what is not there":    {ours, func(p store.Pair) error { return onKey(p, "", refuse) }, refuse},
	} {
		_, err := backup.Restore(t.Context(), bytes.NewReader(save(t, e, row.by)), e, ours, backup.Policy{Check: row.check})
		if !errors.Is(err, row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := backup.Inspect(bytes.NewReader(save(t, e, ours)), cluster().Key); !errors.Is(err, backup.ErrForeign) {
		t.Errorf("inspect with another key: %v", err)
	}
	if _, err := backup.Inspect(strings.NewReader("meshkey1.something else entirely"), ca.ClusterKey{}); !errors.Is(err, backup.ErrFormat) {
		t.Errorf("inspect another file: %v", err)
	}
}

func onKey(p store.Pair, key string, err error) error {
	if p.Key == key {
		return err
	}
	return nil
}

// FuzzInspect feeds files that nobody wrote: no panic, and nothing is intact but
// what was.
func FuzzInspect(f *testing.F) {
	c := cluster()
	file := save(f, engine(f, 2, 10), c)
	f.Add(file)
	f.Add(file[:len(file)-1])
	f.Add([]byte("meshd snapshot 1\n\x00\x00\x00\x02{}\x80\x00\x00\x10"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := backup.Inspect(bytes.NewReader(data), c.Key); err == nil && !bytes.Equal(data, file) {
			t.Error("a file that was not written is intact")
		}
		_, _ = backup.Inspect(bytes.NewReader(data), ca.ClusterKey{}) // whatever it says: no panic
	})
}
