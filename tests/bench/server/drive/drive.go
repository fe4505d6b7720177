// Package drive writes to a replicated store from several clients at once, and
// measures what comes of it. The loop, the keys and the values are the same for
// every store; only how one compare-and-set is asked for differs.
package drive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/tests/bench/load"
)

// System is what is written to.
type System string

// The systems.
const (
	Meshd System = "meshd" // by its HTTPS API, with a token
	Etcd  System = "etcd"  // by its gRPC API
	Raft  System = "raft"  // package bareraft
)

// Target is a store and the way to it.
type Target struct {
	System System `json:"system"`
	// Addresses are host:port of its servers. Client i talks to one of them.
	Addresses []string `json:"addresses"`
	// Roots are certificates in PEM which the servers' chain to; none for Raft.
	Roots string `json:"roots,omitempty"`
	Token string `json:"token,omitempty"`
}

// Writer is one client with one connection, for one goroutine.
type Writer interface {
	// Write sets a key to a value if its revision is the expected one, 0 for a key
	// that does not exist, and returns its new revision. After an error the key's
	// revision is not known.
	Write(ctx context.Context, key string, value []byte, expect uint64) (revision uint64, err error)
	// Close ends the connection.
	Close()
}

var errSystem = errors.New("no such system")

// Open returns a writer to the target's server of that number, modulo how many
// there are. It connects when it first writes.
func (t Target) Open(server int) (Writer, error) {
	address := t.Addresses[server%len(t.Addresses)]
	switch t.System {
	case Meshd:
		return newMeshd(address, t.Roots, t.Token)
	case Etcd:
		return newEtcd(address, t.Roots)
	case Raft:
		return &raftWriter{address: address}, nil
	default:
		return nil, fmt.Errorf("%q: %w", t.System, errSystem)
	}
}

// Job is one measurement.
type Job struct {
	Target Target `json:"target"`
	// Clients write at the same time, each to Keys keys of its own in turn.
	Clients int `json:"clients"`
	Keys    int `json:"keys"`
	// Bytes is the length of a value.
	Bytes int `json:"bytes"`
	// Prefix begins the keys. It must be another one for each job: every key is
	// taken to be absent at first.
	Prefix string        `json:"prefix"`
	Warmup time.Duration `json:"warmup"`
	Window time.Duration `json:"window"`
	// Processes are those of the servers, whose CPU time is taken.
	Processes []int `json:"processes"`
}

// Result is what came of a job within its window.
type Result struct {
	Acked   int           `json:"acked"`
	Failed  int           `json:"failed"`
	Failure string        `json:"failure,omitempty"` // one of them
	Window  time.Duration `json:"window"`
	P50     time.Duration `json:"p50"`
	P99     time.Duration `json:"p99"`
	Max     time.Duration `json:"max"`
	// ServerCPU is what the servers took, ClientCPU what this process took.
	ServerCPU time.Duration `json:"server_cpu"`
	ClientCPU time.Duration `json:"client_cpu"`
}

// PerSecond is the rate of acknowledged writes.
func (r Result) PerSecond() float64 { return float64(r.Acked) / r.Window.Seconds() }

// writeTimeout bounds one write; it is far above every bar.
const writeTimeout = 10 * time.Second

// tally is what one client saw within the window.
type tally struct {
	took    []time.Duration
	failed  int
	failure error
}

// Do carries out a job.
func (j Job) Do(ctx context.Context) (Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begin := time.Now().Add(j.Warmup)
	end := begin.Add(j.Window)
	tallies := make([]tally, j.Clients)
	var clients sync.WaitGroup
	for i := range j.Clients {
		w, err := j.Target.Open(i)
		if err != nil {
			cancel()
			clients.Wait()
			return Result{}, err
		}
		clients.Go(func() {
			defer w.Close()
			tallies[i] = j.client(ctx, w, i, begin, end)
		})
	}
	before, err := j.cpu(ctx, begin)
	if err != nil {
		return Result{}, err
	}
	after, err := j.cpu(ctx, end)
	if err != nil {
		return Result{}, err
	}
	clients.Wait()
	out := sum(tallies)
	out.Window = j.Window
	out.ServerCPU, out.ClientCPU = after.servers-before.servers, after.self-before.self
	if out.Acked == 0 {
		return out, fmt.Errorf("write to %s: none of %d was acknowledged: %s", j.Target.System, out.Failed, out.Failure)
	}
	return out, nil
}

// client writes until the end. What was asked for before the window or answered
// after it does not count.
func (j Job) client(ctx context.Context, w Writer, number int, begin, end time.Time) tally {
	var t tally
	keys, revisions := make([]string, j.Keys), make([]uint64, j.Keys)
	fresh := 0
	key := func() string {
		fresh++
		return fmt.Sprintf("%s-%d-%d", j.Prefix, number, fresh)
	}
	for i := range keys {
		keys[i] = key()
	}
	for n := 0; ctx.Err() == nil; n++ {
		i := n % j.Keys
		value := Value(keys[i], n, j.Bytes)
		began := time.Now()
		if began.After(end) {
			break
		}
		one, cancel := context.WithTimeout(ctx, writeTimeout)
		revision, err := w.Write(one, keys[i], value, revisions[i])
		cancel()
		done := time.Now()
		revisions[i] = revision
		if err != nil {
			keys[i], revisions[i] = key(), 0
		}
		switch {
		case began.Before(begin) || done.After(end):
		case err != nil:
			t.failed++
			t.failure = err
		default:
			t.took = append(t.took, done.Sub(began))
		}
	}
	return t
}

// spent is CPU time up to a moment.
type spent struct{ servers, self time.Duration }

// cpu waits for the moment and looks.
func (j Job) cpu(ctx context.Context, at time.Time) (spent, error) {
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return spent{}, ctx.Err()
	}
	servers, err := load.CPU(j.Processes)
	if err != nil {
		return spent{}, err
	}
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return spent{}, fmt.Errorf("getrusage: %w", err)
	}
	return spent{servers: servers, self: time.Duration(ru.Utime.Nano() + ru.Stime.Nano())}, nil
}

func sum(tallies []tally) Result {
	var out Result
	var all []time.Duration
	for _, t := range tallies {
		all = append(all, t.took...)
		out.Failed += t.failed
		if t.failure != nil {
			out.Failure = t.failure.Error()
		}
	}
	slices.Sort(all)
	out.Acked = len(all)
	out.P50, out.P99, out.Max = Quantile(all, 0.5), Quantile(all, 0.99), Quantile(all, 1)
	return out
}

// Quantile returns the smallest of the sorted values that at least the share q
// of them does not exceed (nearest rank); 0 without values.
func Quantile[T cmp.Ordered](sorted []T, q float64) T {
	if len(sorted) == 0 {
		var zero T
		return zero
	}
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// labelLength is how long one label of a value is.
const labelLength = 60

// Value returns the spec of a node, as JSON of the given length, which is
// another one for every number. Shorter than its name and one label it is not.
func Value(name string, number, length int) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, `{"name":%q,"services":["web","api"],"labels":{"change":"%d"`, name, number)
	const tail = "}}"
	for i := 0; ; i++ {
		label := fmt.Sprintf(`,"label-%d":"`, i)
		room := length - b.Len() - len(label) - len(`"`) - len(tail)
		if room < 1 {
			break
		}
		n := room
		if room > labelLength+len(label)+1 { // another one fits
			n = labelLength
		}
		b.WriteString(label + strings.Repeat("x", n) + `"`)
	}
	b.WriteString(tail)
	return []byte(b.String())
}
