package peer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/google/renameio/v2"

	"github.com/meshd/meshd/server/meshpb"
)

// promiseFile is where a promise is kept, in the directory of the configuration.
const promiseFile = "promise.json"

// errPromised says that this server is bound by an earlier promise.
var errPromised = errors.New("promised already")

// promise is what a server without a state is bound by. It is on disk before
// anybody learns of it.
type promise struct {
	// Last is the newest number that this server has used as a founder.
	Last uint64 `json:"last,omitempty"`
	// Founder, Attempt and Servers are the list that was promised to a founder,
	// which may be this server. A founder's numbers grow, and name one list each.
	Founder string   `json:"founder,omitempty"`
	Attempt uint64   `json:"attempt,omitempty"`
	Servers []Member `json:"servers,omitempty"`
	// Complete says that this server is the founder and has the promises of all: it
	// may have founded the cluster.
	Complete bool `json:"complete,omitempty"`
	// Joining are the IDs of a cluster's servers that were asked to take this one
	// in: they may do so at any time.
	Joining []string `json:"joining,omitempty"`
}

// free reports whether nothing binds.
func (p promise) free() bool { return p.Founder == "" && len(p.Joining) == 0 }

// promises keeps the promise of this server. It is safe for concurrent use.
type promises struct {
	id     string
	expect int
	path   string
	save   func(promise) error

	mu  sync.Mutex
	now promise
}

// openPromises reads what an earlier process has promised.
func openPromises(dir, id string, expect int) (*promises, error) {
	p := &promises{id: id, expect: expect, path: filepath.Join(dir, promiseFile)}
	p.save = p.write
	data, err := os.ReadFile(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err == nil {
		p.now, err = parsePromise(data)
	}
	if err != nil {
		return nil, fmt.Errorf("read what this server has promised at the founding of a cluster: %w", err)
	}
	return p, nil
}

func parsePromise(data []byte) (promise, error) {
	var p promise
	if err := json.Unmarshal(data, &p); err != nil {
		return promise{}, err //nolint:wrapcheck // the caller tells the file
	}
	if p.Founder == "" {
		if p.Attempt != 0 || len(p.Servers) > 0 || p.Complete {
			return promise{}, errors.New("a promise without its founder")
		}
		return p, nil
	}
	if err := checkServers(p.Founder, p.Servers); err != nil {
		return promise{}, err
	}
	return p, nil
}

// write puts the promise on disk, all of it or nothing.
func (p *promises) write(next promise) error {
	data, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("keep a promise: %w", err)
	}
	dir := filepath.Dir(p.path)
	if err := renameio.WriteFile(p.path, data, 0o600, renameio.WithTempDir(dir), renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("keep a promise: %w", err)
	}
	return syncDir(dir)
}

func syncDir(path string) error {
	dir, err := os.Open(path) //nolint:gosec // the state directory
	if err != nil {
		return fmt.Errorf("keep a promise: %w", err)
	}
	defer func() { _ = dir.Close() }() // only read
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("keep a promise: sync %s: %w", path, err)
	}
	return nil
}

// set changes the promise when it is on disk. The caller holds mu.
func (p *promises) set(next promise) error {
	if err := p.save(next); err != nil {
		return err
	}
	p.now = next
	return nil
}

// current returns what binds now.
func (p *promises) current() promise {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// answer decides about a founder's request. An error is the disk's.
func (p *promises) answer(r *meshpb.PromiseRequest, blank bool) (*meshpb.PromiseResponse, error) {
	members := membersOf(r.GetServers())
	p.mu.Lock()
	defer p.mu.Unlock()
	refuse := func(format string, args ...any) (*meshpb.PromiseResponse, error) {
		return &meshpb.PromiseResponse{Reason: fmt.Sprintf(format, args...), Founder: p.now.Founder, Member: !blank}, nil
	}
	switch err := checkServers(r.GetFounder(), members); {
	case !blank:
		return refuse("it has the state of a cluster already")
	case err != nil:
		return refuse("%v", err)
	case int(r.GetExpect()) != p.expect:
		return refuse("its bootstrap_expect is %d, the founder's is %d: they must be equal", p.expect, r.GetExpect())
	case len(members) != p.expect:
		return refuse("%d servers are named, bootstrap_expect is %d", len(members), p.expect)
	case !slices.ContainsFunc(members, func(m Member) bool { return m.ID == p.id }):
		return refuse("it is %s, which is not among them", p.id)
	case r.GetFounder() == p.id:
		return refuse("it is the founder itself")
	case len(p.now.Joining) > 0:
		return refuse("it has asked a cluster of %s to take it", strings.Join(p.now.Joining, ", "))
	}
	next := promise{Last: p.now.Last, Founder: r.GetFounder(), Attempt: r.GetAttempt(), Servers: members}
	switch held := p.now; {
	case held.Founder == r.GetFounder():
		if r.GetAttempt() < held.Attempt {
			return refuse("the founder has tried another list since")
		}
		if r.GetAttempt() == held.Attempt {
			if !slices.Equal(held.Servers, members) {
				return refuse("it is another list under the same number")
			}
			return &meshpb.PromiseResponse{Promised: true}, nil
		}
	case held.Founder == p.id:
		// An own attempt may be given up while promises are missing. The lower name
		// goes on, so that of several founders one always does.
		if held.Complete || !lower(r.GetFounder(), p.id) {
			return refuse("it founds a cluster itself")
		}
	case held.Founder != "":
		return refuse("it has promised another list to %s", held.Founder)
	}
	if err := p.set(next); err != nil {
		return nil, err
	}
	return &meshpb.PromiseResponse{Promised: true}, nil
}

// begin starts an attempt of this server to found a cluster, or goes on with the
// one that it is at. Complete says that all have promised already.
func (p *promises) begin(members []Member) (attempt uint64, list []Member, complete bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case len(p.now.Joining) > 0:
		return 0, nil, false, errPromised
	case p.now.Complete:
		return p.now.Attempt, p.now.Servers, true, nil
	case p.now.Founder == p.id && slices.Equal(p.now.Servers, members):
		return p.now.Attempt, members, false, nil
	case p.now.Founder == p.id || p.now.free():
	default:
		return 0, nil, false, errPromised
	}
	next := promise{Last: p.now.Last + 1, Founder: p.id, Attempt: p.now.Last + 1, Servers: members}
	if err := checkServers(p.id, members); err != nil {
		return 0, nil, false, err
	}
	if err := p.set(next); err != nil {
		return 0, nil, false, err
	}
	return next.Attempt, members, false, nil
}

// complete notes that all have promised the attempt, unless it was given up.
func (p *promises) complete(attempt uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now.Founder != p.id || p.now.Attempt != attempt {
		return errPromised
	}
	next := p.now
	next.Complete = true
	return p.set(next)
}

// yield gives up an own attempt, whose number is never used again. It reports
// whether this server is free then.
func (p *promises) yield() (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now.free() {
		return true, nil
	}
	if p.now.Founder != p.id || p.now.Complete {
		return false, nil
	}
	return true, p.set(promise{Last: p.now.Last})
}

// release drops the promise to a founder that has said itself that it is not at
// that attempt any more, and has no state.
func (p *promises) release(founder string, attempt uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now.Founder != founder || p.now.Attempt != attempt || founder == p.id {
		return nil
	}
	return p.set(promise{Last: p.now.Last})
}

// joining binds this server to a cluster, which it may then ask to take it. A
// server that has promised to take part in a new cluster may do so only where a
// server of that list is a member: then the list was founded there, or never will
// be.
func (p *promises) joining(cluster []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now.Founder == p.id && !p.now.Complete {
		if err := p.set(promise{Last: p.now.Last}); err != nil {
			return err
		}
	}
	known := slices.Clone(p.now.Joining)
	for _, m := range p.now.Servers {
		known = append(known, m.ID)
	}
	if len(known) > 0 && !slices.ContainsFunc(known, func(id string) bool { return id != p.id && slices.Contains(cluster, id) }) {
		return fmt.Errorf("%w: to %s, and none of them is in the cluster of %s; if no such cluster was founded, stop this server, remove %s, and start it again",
			errPromised, strings.Join(known, ", "), strings.Join(cluster, ", "), p.path)
	}
	cluster = slices.Sorted(slices.Values(cluster))
	if slices.Equal(p.now.Joining, cluster) {
		return nil
	}
	next := p.now
	next.Joining = cluster
	return p.set(next)
}

// done forgets everything: this server is a member.
func (p *promises) done() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now.free() && p.now.Last == 0 {
		return nil
	}
	if err := os.Remove(p.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget a kept promise: %w", err)
	}
	p.now = promise{}
	return nil
}

// checkServers checks the list of a new cluster, in the order of names.
func checkServers(founder string, members []Member) error {
	if len(members) == 0 || members[0].ID != founder {
		return fmt.Errorf("the founder, %q, is not the first of the servers", founder)
	}
	addresses := map[string]bool{}
	for i, m := range members {
		if err := checkID(m.ID); err != nil {
			return err
		}
		if err := checkAddress(m.Address); err != nil {
			return err
		}
		if i > 0 && !lower(members[i-1].ID, m.ID) {
			return fmt.Errorf("%s and %s are out of order, or have one name", members[i-1].ID, m.ID)
		}
		if addresses[m.Address] {
			return fmt.Errorf("%s is the address of two servers", m.Address)
		}
		addresses[m.Address] = true
	}
	return nil
}

// lower orders servers by name: at a founding two of one name are never in a list.
func lower(a, b string) bool { return Name(a) < Name(b) }

func membersOf(servers []*meshpb.KnownServer) []Member {
	members := make([]Member, 0, len(servers))
	for _, s := range servers {
		members = append(members, Member{ID: s.GetId(), Address: s.GetAddress()})
	}
	return members
}
