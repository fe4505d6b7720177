package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/fault/history"
	"github.com/meshd/meshd/tests/machines"
)

// namespace is where the clients' services are; a service's owner is its value.
const namespace = "load"

// registers are the keys that clients compare and set; together are written in one
// transaction with one value, toggle with few values over and over.
var (
	registers = []string{"r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7"} //nolint:gochecknoglobals // never changed
	together  = []string{"p0", "p1"}                                     //nolint:gochecknoglobals // never changed
)

const toggle = "t0"

// Load is a number of clients that use all servers, and one watch of each server.
type Load struct {
	*history.History

	cluster *Cluster
	traces  []*tracer
	work    sync.WaitGroup // of the clients
	watches sync.WaitGroup

	stopClients, stopWatches context.CancelFunc

	mu       sync.Mutex
	problems []error
}

// loader is one client.
type loader struct {
	load    *Load
	id      int
	random  *rand.Rand
	servers []*client.Client
	at      int // the server that it uses
	known   map[string]history.Version
	wrote   int
}

// operationTimeout bounds what a client waits for. A server that has no leader says
// so before.
const operationTimeout = 6 * time.Second

// Load starts clients that together do rate operations in a second, as far as the
// servers let them; they end with the test at the latest.
func (c *Cluster) Load(random *rand.Rand, clients, rate int) *Load {
	c.t.Helper()
	c.t.Logf("%d clients, %d operations/s", clients, rate)
	l := &Load{History: history.New(), cluster: c}
	admin := c.Servers[0].API()
	if _, err := admin.Put(c.t.Context(), client.Ref{Kind: client.KindNamespace, Parts: []string{namespace}},
		json.RawMessage(`{"name":"`+namespace+`"}`), client.AnyRevision); err != nil {
		c.t.Fatal(err)
	}
	var ctx, watching context.Context
	ctx, l.stopClients = context.WithCancel(c.t.Context())
	watching, l.stopWatches = context.WithCancel(c.t.Context())
	c.t.Cleanup(l.End)
	for _, s := range c.Servers {
		tr := &tracer{load: l, server: s, api: s.API(), trace: history.Trace{Name: s.Name}}
		l.traces = append(l.traces, tr)
		l.watches.Go(func() { tr.run(watching) })
	}
	every := time.Second * time.Duration(clients) / time.Duration(rate)
	for i := range clients {
		one := &loader{load: l, id: i, random: rand.New(rand.NewPCG(random.Uint64(), 0)), at: i, known: map[string]history.Version{}}
		for _, s := range c.Servers {
			one.servers = append(one.servers, s.API())
		}
		l.work.Go(func() { one.run(ctx, every) })
	}
	return l
}

// End ends the clients and the watches.
func (l *Load) End() {
	l.stopClients()
	l.work.Wait()
	l.stopWatches()
	l.watches.Wait()
}

func (o *loader) run(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// What has begun is finished, so that its outcome is known.
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), operationTimeout)
		o.step(call)
		cancel()
	}
}

// step does one operation.
func (o *loader) step(ctx context.Context) {
	key := registers[o.random.IntN(len(registers))]
	if o.random.IntN(2) == 0 {
		key = fmt.Sprintf("own%d", o.id) // which nobody else writes: no conflicts
	}
	version, known := o.known[key]
	switch n := o.random.IntN(100); {
	case n < 3:
		o.list(ctx)
	case n < 6:
		o.both(ctx)
	case n < 9:
		o.write(ctx, history.Op{Key: toggle, Any: true, Value: []string{"on", "off"}[o.random.IntN(2)]}, client.AnyRevision)
	case n < 12:
		o.read(ctx, toggle)
	case n < 30 || !known:
		o.read(ctx, key)
	case n < 36 && version.Revision != 0:
		o.remove(ctx, key, version)
	default:
		o.write(ctx, history.Op{Key: key, Expect: version.Value, Value: o.value()}, version.Revision)
	}
}

// value returns one that nobody else writes.
func (o *loader) value() string {
	o.wrote++
	return fmt.Sprintf("c%d-%d", o.id, o.wrote)
}

func (o *loader) api() *client.Client { return o.servers[o.at%len(o.servers)] }

func refOf(key string) client.Ref {
	return client.Ref{Kind: client.KindService, Parts: []string{namespace, key}}
}

func specOf(key, value string) json.RawMessage {
	spec, _ := json.Marshal(catalog.Service{Namespace: namespace, Name: key, Owner: value}) // it always can be
	return spec
}

func valueOf(i client.Item) history.Version {
	var s catalog.Service
	if err := json.Unmarshal(i.Spec, &s); err != nil {
		return history.Version{Value: "damaged: " + string(i.Spec), Revision: i.Revision}
	}
	return history.Version{Value: s.Owner, Revision: i.Revision}
}

func (o *loader) read(ctx context.Context, key string) {
	op := history.Op{Client: o.id, Key: key, Kind: history.Read, Outcome: history.OK, Invoked: o.load.Now()}
	item, err := o.api().Get(ctx, refOf(key))
	op.Returned = o.load.Now()
	switch client.CodeOf(err) {
	case client.CodeNotFound:
		o.known[key] = history.Version{}
		o.load.Add(op)
	default:
		if err != nil {
			o.failed(err)
			return
		}
		v := valueOf(item)
		o.known[key] = v
		op.Value, op.Revision = v.Value, v.Revision
		o.load.Add(op)
	}
}

// list reads all keys at once.
func (o *loader) list(ctx context.Context) {
	began := o.load.Now()
	all, err := o.api().List(ctx, client.KindService, client.Selection{Namespace: namespace})
	if err != nil {
		o.failed(err)
		return
	}
	returned := o.load.Now()
	state := stateOf(all.Items)
	if err := history.CheckList(state, together); err != nil {
		o.load.problem(err)
	}
	keys := slices.Concat(registers, together, []string{toggle})
	for key := range state {
		if strings.HasPrefix(key, "own") {
			keys = append(keys, key)
		}
	}
	for _, key := range keys {
		v := state[key]
		o.known[key] = v
		o.load.Add(history.Op{
			Client: o.id, Key: key, Kind: history.Read, Outcome: history.OK, Value: v.Value, Revision: v.Revision, Invoked: began, Returned: returned,
		})
	}
}

func stateOf(items []client.Item) map[string]history.Version {
	state := map[string]history.Version{}
	for _, i := range items {
		state[i.Ref.Parts[len(i.Ref.Parts)-1]] = valueOf(i)
	}
	return state
}

func (o *loader) write(ctx context.Context, op history.Op, revision uint64) {
	op.Client, op.Kind, op.Invoked = o.id, history.Write, o.load.Now()
	result, err := o.api().Put(ctx, refOf(op.Key), specOf(op.Key, op.Value), revision)
	op.Returned = o.load.Now()
	if o.settle(&op, err) && op.Outcome == history.OK {
		if len(result.Changes) == 1 {
			op.Revision = result.Changes[0].Revision
		}
		o.known[op.Key] = history.Version{Value: op.Value, Revision: op.Revision}
		o.load.Add(op)
	}
}

func (o *loader) remove(ctx context.Context, key string, v history.Version) {
	op := history.Op{Client: o.id, Key: key, Kind: history.Delete, Expect: v.Value, Invoked: o.load.Now()}
	result, err := o.api().Delete(ctx, refOf(key), v.Revision)
	op.Returned = o.load.Now()
	if o.settle(&op, err) && op.Outcome == history.OK {
		op.Revision = result.Position.Revision
		o.known[key] = history.Version{}
		o.load.Add(op)
	}
}

// both writes a value to two keys in one transaction.
func (o *loader) both(ctx context.Context) {
	op := history.Op{Client: o.id, Kind: history.Write, Any: true, Value: o.value(), Invoked: o.load.Now()}
	var req client.ApplyRequest
	for _, key := range together {
		req.Resources = append(req.Resources, client.Resource{Kind: client.KindService, Spec: specOf(key, op.Value)})
	}
	result, err := o.api().Apply(ctx, req)
	op.Returned = o.load.Now()
	for i, key := range together {
		one := op
		one.Key = key
		if o.settle(&one, err) && one.Outcome == history.OK {
			if i < len(result.Changes) {
				one.Revision = result.Changes[i].Revision
			}
			o.load.Add(one)
		}
	}
}

// settle finds the outcome of a write by its error, and records it unless it is OK.
// It reports whether the write may have been done.
func (o *loader) settle(op *history.Op, err error) bool {
	switch client.CodeOf(err) {
	case client.CodeUnavailable, client.CodeUnreachable, client.CodeDiskFull:
		o.failed(err)
		return false
	case client.CodeConflict:
		op.Outcome = history.Conflict
	case client.CodeNotFound:
		op.Outcome = history.Missing
	default:
		if err == nil {
			op.Outcome = history.OK
			return true
		}
		op.Outcome = history.Unknown
		o.failed(err)
	}
	delete(o.known, op.Key)
	o.load.Add(*op)
	return true
}

// failed goes on to another server, and keeps what no fault explains.
func (o *loader) failed(err error) {
	o.at++
	switch client.CodeOf(err) {
	case client.CodeUnavailable, client.CodeUnreachable, client.CodeUnknown, client.CodeDiskFull:
	default:
		if !errors.Is(err, context.DeadlineExceeded) {
			o.load.problem(fmt.Errorf("client %d: %w", o.id, err))
		}
	}
}

func (l *Load) problem(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problems = append(l.problems, err)
}

// NextAck waits until a write is acknowledged that began after a time of the
// history, and returns how long after it that was.
func (l *Load) NextAck(t *testing.T, after, limit time.Duration) time.Duration {
	t.Helper()
	var took time.Duration
	machines.Eventually(t, limit, "another write is acknowledged", func() string {
		op, ok := l.Acked(after)
		if !ok {
			return "none is"
		}
		took = op.Returned - after
		return ""
	})
	return took
}

// Ask reads all keys at once through one server, and records what it answers. It may
// run beside others.
func (l *Load) Ask(ctx context.Context, s *Server) {
	var all sync.WaitGroup
	for i, key := range registers {
		o := &loader{load: l, id: askers + i, known: map[string]history.Version{}, servers: []*client.Client{s.API()}}
		all.Go(func() { o.read(ctx, key) })
	}
	all.Wait()
}

// askers is the number of the first client that is none of a Load's own.
const askers = 1000

// Rate returns how many writes a second were acknowledged between two times of the
// history.
func (l *Load) Rate(from, to time.Duration) float64 {
	n := 0
	for _, o := range l.Ops() {
		if o.Kind != history.Read && o.Outcome == history.OK && o.Returned >= from && o.Returned < to {
			n++
		}
	}
	return float64(n) / (to - from).Seconds()
}
