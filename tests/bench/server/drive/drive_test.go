package drive_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/tests/bench/server/bareraft"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		sorted []int
		q      float64
		want   int
	}{
		{nil, 0.5, 0},
		{[]int{7}, 0, 7},
		{[]int{7}, 0.99, 7},
		{[]int{1, 2, 3, 4}, 0, 1},
		{[]int{1, 2, 3, 4}, 0.5, 2},
		{[]int{1, 2, 3, 4}, 0.51, 3},
		{[]int{1, 2, 3, 4}, 0.9, 4},
		{[]int{1, 2, 3, 4}, 1, 4},
		{[]int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 0.9, 9},
	} {
		if got := drive.Quantile(c.sorted, c.q); got != c.want {
			t.Errorf("Quantile(%v, %v) = %d, want %d", c.sorted, c.q, got, c.want)
		}
	}
}

func TestValue(t *testing.T) {
	for _, length := range []int{150, 151, 200, 213, 214, 215, 500, 1000, 3000} {
		a, b := drive.Value("b1-2-3", 1, length), drive.Value("b1-2-3", 2, length)
		if len(a) != length || bytes.Equal(a, b) {
			t.Errorf("length %d: %d bytes, equal for two numbers: %v", length, len(a), bytes.Equal(a, b))
		}
		var node catalog.Node
		if err := json.Unmarshal(a, &node); err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		if err := node.Validate(); err != nil || node.Name != "b1-2-3" {
			t.Errorf("node %q: %v", node.Name, err)
		}
	}
}

// The bytes are a TxnRequest of etcd's rpc.proto in the wire format of protobuf.
func TestCompareAndSet(t *testing.T) {
	got := drive.CompareAndSet("k", []byte("vv"), 300)
	want := []byte{
		0x0a, 0x08, 0x10, 2, 0x1a, 1, 'k', 0x30, 0xac, 0x02, // compare: target MOD, key, mod_revision
		0x12, 0x09, 0x12, 0x07, 0x0a, 1, 'k', 0x12, 2, 'v', 'v', // success: request_put: key, value
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got  % x\nwant % x", got, want)
	}
}

func TestTxnRevision(t *testing.T) {
	header := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 99)
	header = protowire.AppendVarint(protowire.AppendTag(header, 3, protowire.VarintType), 4711)
	answer := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), header)
	if got, err := drive.TxnRevision(answer); err == nil {
		t.Errorf("a comparison that failed gives revision %d", got)
	}
	answer = protowire.AppendVarint(protowire.AppendTag(answer, 2, protowire.VarintType), 1)
	if got, err := drive.TxnRevision(answer); err != nil || got != 4711 {
		t.Errorf("revision %d, error %v", got, err)
	}
	for n := range answer {
		if got, err := drive.TxnRevision(answer[:n]); err == nil {
			t.Errorf("the first %d bytes give revision %d", n, got)
		}
	}
}

// startRaft starts three members and returns the addresses for clients, and
// functions that end one each.
func startRaft(t *testing.T) ([]string, []func()) {
	t.Helper()
	cfg := bareraft.Config{Heartbeat: 100 * time.Millisecond, Election: 100 * time.Millisecond, Lease: 50 * time.Millisecond}
	var addresses []string
	for range 3 {
		cfg.Members = append(cfg.Members, bareraft.Member{Peer: freeAddress(t), Client: freeAddress(t)})
	}
	var ends []func()
	dir := t.TempDir()
	for i, m := range cfg.Members {
		one := cfg
		one.Dir, one.Self = filepath.Join(dir, fmt.Sprint(i)), i
		addresses = append(addresses, m.Client)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- bareraft.Run(ctx, one) }()
		ended := false
		end := func() {
			cancel()
			if ended {
				return
			}
			ended = true
			if err := <-done; err != nil {
				t.Errorf("member %d: %v", i, err)
			}
		}
		ends = append(ends, end)
		t.Cleanup(end)
	}
	return addresses, ends
}

func freeAddress(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	return l.Addr().String()
}

// eventually writes through any of the addresses until one acknowledges, and
// returns its number.
func eventually(t *testing.T, addresses []string, key string) (int, uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for i := 0; ; i = (i + 1) % len(addresses) {
		w, err := drive.Target{System: drive.Raft, Addresses: addresses}.Open(i)
		if err != nil {
			t.Fatal(err)
		}
		one, stop := context.WithTimeout(ctx, time.Second)
		revision, err := w.Write(one, key, []byte("value"), 0)
		stop()
		w.Close()
		if err == nil {
			return i, revision
		}
		if ctx.Err() != nil {
			t.Fatalf("no member wrote: %v", err)
		}
	}
}

func TestBareRaft(t *testing.T) {
	addresses, ends := startRaft(t)
	leader, revision := eventually(t, addresses, "a")
	to := drive.Target{System: drive.Raft, Addresses: addresses[leader : leader+1]}
	w, err := to.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write(t.Context(), "a", []byte("other"), revision+1000); !bareraft.Refused(err) {
		t.Errorf("a wrong revision: %v", err)
	}
	if _, err := w.Write(t.Context(), "a", []byte("other"), revision); err != nil {
		t.Errorf("the right revision: %v", err)
	}

	job := drive.Job{
		Target: to, Clients: 3, Keys: 2, Bytes: 200, Prefix: "job",
		Warmup: 50 * time.Millisecond, Window: 300 * time.Millisecond,
	}
	got, err := job.Do(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.Acked == 0 || got.Failed != 0 || got.P50 <= 0 || got.P99 < got.P50 || got.Max < got.P99 {
		t.Errorf("result %+v", got)
	}

	ends[leader]()
	if next, _ := eventually(t, addresses, "b"); next == leader {
		t.Errorf("member %d writes after its end", next)
	}
}

func TestNobodyAnswers(t *testing.T) {
	job := drive.Job{
		Target: drive.Target{System: drive.Raft, Addresses: []string{freeAddress(t)}}, Clients: 1, Keys: 1, Bytes: 200, Prefix: "x",
		Warmup: time.Millisecond, Window: 50 * time.Millisecond,
	}
	if got, err := job.Do(t.Context()); err == nil {
		t.Errorf("without a server: %+v", got)
	}
	if _, err := (drive.Target{System: "paper", Addresses: []string{"x"}}).Open(0); err == nil {
		t.Error("an unknown system can be opened")
	}
}
