package audit_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/audit"
	"github.com/meshd/meshd/server/client"
)

func newKey(tb testing.TB) ca.Secret {
	tb.Helper()
	key, err := ca.GenerateClusterKey().Derive("audit")
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// start runs a log in dir, until the returned function is called.
func start(tb testing.TB, config audit.Config) (*audit.Log, func()) {
	tb.Helper()
	if config.FileBytes == 0 {
		config.FileBytes, config.Files = 1<<20, 4
	}
	config.Server = "s1"
	l := audit.New(config, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	return l, func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	}
}

func keep(tb testing.TB, l *audit.Log, records ...client.AuditRecord) {
	tb.Helper()
	for _, r := range records {
		done, err := l.Reserve()
		if err != nil {
			tb.Fatal(err)
		}
		done(r)
	}
}

func request(i int) client.AuditRecord {
	return client.AuditRecord{
		Time: time.Date(2026, 11, 22, 2, 0, i, 0, time.UTC), RequestID: fmt.Sprintf("id-%d", i), Who: []string{"token:a", "local:admin-socket"}[i%2], Title: "ci <deploy>",
		Verb: "write", Resource: "intention", Method: "PUT", Route: "/v1/intentions/{…}", Outcome: []string{"allowed", "failed", "denied"}[i%3], Status: 200, Revision: uint64(i),
		Changes: []client.AuditChange{{Kind: client.KindIntention, Name: "web → api", Change: "created"}},
	}
}

// written makes a log of n records.
func written(tb testing.TB, key ca.Secret, n int) string {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "audit")
	l, stop := start(tb, audit.Config{Dir: dir, Key: key})
	for i := range n {
		changed := l.Changed()
		keep(tb, l, request(i))
		<-changed // so that files are cut anywhere
	}
	stop()
	return dir
}

func files(tb testing.TB, dir string) []string {
	tb.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "audit*.jsonl"))
	if err != nil {
		tb.Fatal(err)
	}
	slices.SortFunc(names, func(a, b string) int { // the current one last
		return strings.Compare(strings.Replace(a, "audit.jsonl", "audit-9", 1), strings.Replace(b, "audit.jsonl", "audit-9", 1))
	})
	return names
}

func seqs(records []client.AuditRecord) []uint64 {
	var out []uint64
	for _, r := range records {
		out = append(out, r.Seq)
	}
	return out
}

func TestLogIsReadBack(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	dir := filepath.Join(t.TempDir(), "audit")
	l, stop := start(t, audit.Config{Dir: dir, Key: key, FileBytes: 1500, Files: 100})
	changed := l.Changed()
	for i := range 20 { // their numbers are 2 to 21
		keep(t, l, request(i))
		<-changed
		changed = l.Changed()
	}
	read := func(q client.AuditQuery) []client.AuditRecord {
		t.Helper()
		got, err := l.Read(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	for name, row := range map[string]struct {
		query client.AuditQuery
		want  []uint64
	}{
		"the newest":     {client.AuditQuery{Limit: 3}, []uint64{19, 20, 21}},
		"after":          {client.AuditQuery{After: 4, Limit: 3}, []uint64{5, 6, 7}},
		"after the last": {client.AuditQuery{After: 21}, nil},
		"who":            {client.AuditQuery{Who: "token:a", Limit: 2}, []uint64{18, 20}},
		"title":          {client.AuditQuery{Who: "ci <deploy>", Limit: 1}, []uint64{21}},
		"since":          {client.AuditQuery{Since: request(17).Time}, []uint64{19, 20, 21}},
		"outcome, after": {client.AuditQuery{Outcome: "denied", After: 5, Limit: 2}, []uint64{7, 10}},
		"kind":           {client.AuditQuery{Kind: "intention", Limit: 1}, []uint64{21}},
		"another kind":   {client.AuditQuery{Kind: "node"}, nil},
		"one request":    {client.AuditQuery{RequestID: "id-3"}, []uint64{5}},
		"all of the runs": {client.AuditQuery{Limit: 100, After: 0, Outcome: ""}, func() (all []uint64) {
			for i := range uint64(21) {
				all = append(all, i+1)
			}
			return all
		}()},
	} {
		if diff := cmp.Diff(row.want, seqs(read(row.query))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	want := request(3)
	got := read(client.AuditQuery{RequestID: "id-3"})[0]
	want.Seq, want.Server, want.Event, want.Prev, want.MAC = 5, "s1", client.AuditRequest, got.Prev, got.MAC
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("a record (-want +got):\n%s", diff)
	}
	stop()
	if n := len(files(t, dir)); n < 3 {
		t.Errorf("%d files", n)
	}
	// Another run goes on with the same chain.
	_, stop = start(t, audit.Config{Dir: dir, Key: key})
	stop()
	report, err := audit.Verify(dir, key)
	if err != nil || report.First != 1 || report.Last != 24 || !report.Closed || !report.Signed || report.Server != "s1" {
		t.Errorf("verify: %+v, %v", report, err)
	}
	for _, path := range append(files(t, dir), dir) {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

// Every change of what was written is found, and where it is.
func TestVerifyFindsTampering(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	for name, row := range map[string]struct {
		change func(lines []string) []string
		want   string
		keyed  bool // found with the key only
	}{
		"edit":             {func(l []string) []string { l[4] = strings.Replace(l[4], `"revision":3`, `"revision":4`, 1); return l }, "audit.jsonl:5: record 5 was changed", false},
		"edit a name":      {func(l []string) []string { l[4] = strings.Replace(l[4], "web →", "wob →", 1); return l }, "audit.jsonl:5: record 5 was changed", false},
		"edit the mac":     {func(l []string) []string { l[4] = l[4][:len(l[4])-6] + `0000"}`; return l }, "audit.jsonl:5: record 5 was changed", false},
		"no mac":           {func(l []string) []string { l[4] = l[4][:strings.Index(l[4], `,"mac"`)] + "}"; return l }, "audit.jsonl:5: record 5 was changed", false},
		"delete":           {func(l []string) []string { return slices.Delete(l, 4, 6) }, "audit.jsonl:5: records 5 to 6 are missing before it", false},
		"delete the begin": {func(l []string) []string { return l[3:] }, "audit.jsonl:1: records 1 to 3 are missing before it, and no record tells", false},
		"repeat":           {func(l []string) []string { return slices.Insert(l, 4, l[3]) }, "audit.jsonl:5: record 4 stands where 5 belongs", false},
		"swap":             {func(l []string) []string { l[3], l[4] = l[4], l[3]; return l }, "audit.jsonl:4: records 4 to 4 are missing", false},
		"insert":           {func(l []string) []string { return slices.Insert(l, 4, `{"seq":5}`) }, "audit.jsonl:5: it is no record", false},
		"no JSON":          {func(l []string) []string { l[2] = "x"; return l }, "audit.jsonl:3: it is no record", false},
		"chain anew":       {func(l []string) []string { return rechain(t, l, 4) }, "audit.jsonl:5: record 5 was changed", true},
	} {
		dir := written(t, key, 8)
		path := filepath.Join(dir, "audit.jsonl")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := row.change(strings.Split(strings.TrimSuffix(string(data), "\n"), "\n"))
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = audit.Verify(dir, key)
		if !errors.Is(err, audit.ErrBroken) || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want %q", name, err, row.want)
		}
		if _, err := audit.Verify(dir, ca.Secret{}); (err == nil) != row.keyed {
			t.Errorf("%s, without the key: %v", name, err)
		}
	}
}

// rechain edits a line and computes what follows anew, as someone without the key
// can.
func rechain(tb testing.TB, lines []string, at int) []string {
	tb.Helper()
	lines[at] = strings.Replace(lines[at], `"revision":3`, `"revision":4`, 1)
	for i := at + 1; i < len(lines); i++ {
		sum := sha256.Sum256([]byte(lines[i-1]))
		cut := strings.Index(lines[i], `"prev":"`) + len(`"prev":"`)
		lines[i] = lines[i][:cut] + hex.EncodeToString(sum[:]) + lines[i][cut+64:]
	}
	return lines
}

// What is cut off at the end does not show, but for the number of the last record.
func TestVerifyTellsTheEnd(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	dir := written(t, key, 8)
	whole, err := audit.Verify(dir, key)
	if err != nil || !whole.Closed || whole.Last != 10 {
		t.Fatalf("%+v, %v", whole, err)
	}
	path := filepath.Join(dir, "audit.jsonl")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(data, []byte("\n"))
	cut := append(bytes.Join(lines[:6], nil), lines[6][:20]...)
	if err := os.WriteFile(path, cut, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := audit.Verify(path, key)
	if err != nil || got.Closed || got.Last != 6 || got.Unfinished != 20 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := audit.Verify(dir, newKey(t)); !errors.Is(err, audit.ErrBroken) {
		t.Errorf("another key: %v", err)
	}
	if _, err := audit.Verify(t.TempDir(), key); err == nil {
		t.Error("an empty folder is a log")
	}
}

// The oldest files go, which the log itself tells; without that it would be a
// deletion.
func TestOldFilesAreRemoved(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	dir := filepath.Join(t.TempDir(), "audit")
	l, stop := start(t, audit.Config{Dir: dir, Key: key, FileBytes: 1200, Files: 2})
	for i := range 30 {
		changed := l.Changed()
		keep(t, l, request(i))
		<-changed
	}
	stop()
	all := files(t, dir)
	if len(all) != 3 {
		t.Errorf("files %v", all)
	}
	report, err := audit.Verify(dir, key)
	if err != nil || report.First < 20 || report.Last < 32 {
		t.Errorf("%+v, %v", report, err)
	}
	if err := os.Remove(all[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir, key); !errors.Is(err, audit.ErrBroken) || !strings.Contains(err.Error(), "are missing before it") {
		t.Errorf("one more is gone: %v", err)
	}
	if err := os.Remove(all[2]); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(all[1], key); err == nil {
		t.Error("a file from the middle alone is whole")
	}
}

// A crash leaves an unfinished record, or one of zeros. It is put aside, and the
// chain goes on.
func TestLogGoesOnAfterACrash(t *testing.T) {
	t.Parallel()
	key := newKey(t)
	for name, tail := range map[string]string{
		"half a record": `{"seq":11,"time":"2026-`, "zeros": strings.Repeat("\x00", 5000), "a broken line": "{\"seq\":11}\n", "nothing": "",
	} {
		dir := written(t, key, 8)
		file, err := os.OpenFile(filepath.Join(dir, "audit.jsonl"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteString(tail); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		l, stop := start(t, audit.Config{Dir: dir, Key: key})
		changed := l.Changed()
		keep(t, l, request(1))
		<-changed
		stop()
		report, err := audit.Verify(dir, key)
		if err != nil || report.Last < 13 || !report.Closed {
			t.Errorf("%s: %+v, %v", name, report, err)
		}
		got, err := l.Read(t.Context(), client.AuditQuery{After: 10})
		if err != nil || (got[0].Event == client.AuditRecovered) != (tail != "") || tail != "" && got[0].Count != uint64(len(tail)) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		aside, err := filepath.Glob(filepath.Join(dir, "torn-*"))
		if err != nil || (len(aside) == 1) != (tail != "") {
			t.Errorf("%s: put aside %v, %v", name, aside, err)
		}
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := audit.New(audit.Config{Dir: open, Key: key}, slog.New(slog.DiscardHandler)).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
		t.Errorf("a folder that others can enter: %v", err)
	}
}

// While nothing reaches the disk a bounded number of changes may begin.
func TestReserveIsBounded(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "audit")
	key := newKey(t)
	l := audit.New(audit.Config{Dir: dir, Server: "s1", Key: key, FileBytes: 64 << 20, Files: 1}, slog.New(slog.DiscardHandler))
	n := 0
	var err error
	for ; err == nil && n < 100_000; n++ {
		var done func(client.AuditRecord)
		if done, err = l.Reserve(); err == nil {
			done(request(n))
		}
	}
	if !errors.Is(err, audit.ErrUnavailable) || n != 4097 {
		t.Fatalf("%d places, %v", n-1, err)
	}
	l.Note(client.AuditRecord{Who: "anonymous", Outcome: "denied"}) // counted, as there is no place
	if s := l.Stats(); s.Waiting != 4096 || s.Suppressed != 1 {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	changed := l.Changed()
	go func() { done <- l.Run(ctx) }()
	<-changed
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if report, err := audit.Verify(dir, key); err != nil || report.Last != 4096+3 { // opened, suppressed, closed
		t.Errorf("%+v, %v", report, err)
	}
	if _, err := l.Reserve(); !errors.Is(err, audit.ErrUnavailable) {
		t.Errorf("after the end: %v", err)
	}
}

// Whoever may nothing can't fill the log.
func TestDenialsAreSuppressed(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "audit")
	key := newKey(t)
	l, stop := start(t, audit.Config{Dir: dir, Key: key})
	for range 1000 {
		l.Note(client.AuditRecord{Who: "anonymous", Outcome: "denied"})
	}
	l.Note(client.AuditRecord{Who: "token:x", Outcome: "denied"})
	stop()
	all, err := l.Read(t.Context(), client.AuditQuery{Limit: 2000})
	if err != nil {
		t.Fatal(err)
	}
	recorded, told := 0, uint64(0)
	for _, r := range all {
		switch {
		case r.Who == "anonymous":
			recorded++
		case r.Event == client.AuditSuppressed:
			told += r.Count
		}
	}
	if recorded < 50 || recorded > 70 || recorded+int(told) != 1000 || len(all) > recorded+10 {
		t.Errorf("%d recorded, %d told of, %d records", recorded, told, len(all))
	}
}

// FuzzVerify feeds files that nobody wrote: no panic, and nothing is signed but
// what was.
func FuzzVerify(f *testing.F) {
	key := newKey(f)
	data, err := os.ReadFile(filepath.Join(written(f, key, 2), "audit.jsonl"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{\"seq\":1,\"event\":\"request\",\"prev\":\"\"}\n"))
	f.Fuzz(func(t *testing.T, changed []byte) {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		report, err := audit.Verify(path, key)
		if err == nil && !bytes.HasPrefix(data, changed[:len(changed)-report.Unfinished]) {
			t.Errorf("signed: %q", changed)
		}
	})
}
