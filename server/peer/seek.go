package peer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshd/meshd/server/meshpb"
)

const (
	// seekFirst and seekMax are the pauses between two tries to become a member,
	// which double while nothing changes.
	seekFirst = 250 * time.Millisecond
	seekMax   = 3 * time.Second
	// lostAfter is for how long a member has no leader before it asks whether it was
	// removed: a server that was away when that happened is told by nobody else.
	lostAfter = 5 * time.Second
)

// calls are what a seeker says to others: Peer, and a stand-in for tests.
type calls interface {
	hello(ctx context.Context, to Member, own *meshpb.Introduction) (*meshpb.Introduction, error)
	promise(ctx context.Context, to Member, r *meshpb.PromiseRequest) (*meshpb.PromiseResponse, error)
	join(ctx context.Context, to Member, r *meshpb.PeerJoinRequest) (*meshpb.PeerJoinResponse, error)
}

// seeker makes this server a member of a cluster, and sees that it stays one. Its
// methods are called by one goroutine.
type seeker struct {
	id, address string
	expect      int
	cluster     Cluster
	promises    *promises
	met         *met
	calls       calls
	each        func(n int, do func(i int)) // all at once, and waits for them
	introduce   func() *meshpb.Introduction
	find        func(ctx context.Context) (targets, problems []string)
	tell        func(ctx context.Context, waiting string)
	log         *slog.Logger
}

func (p *Peer) newSeeker(cluster Cluster, s *service) *seeker {
	resolver := p.cfg.Resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	f := &finder{join: p.cfg.Join, resolver: resolver}
	return &seeker{
		id: p.cfg.ID, address: p.cfg.Advertise, expect: p.cfg.Expect, cluster: cluster, promises: s.promises, met: s.met,
		calls: p, each: atOnce, introduce: s.introduction, log: p.log,
		find: func(ctx context.Context) ([]string, []string) { return f.find(ctx, time.Now()) },
		tell: p.tell,
	}
}

func atOnce(n int, do func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { do(i) })
	}
	group.Wait()
}

// tell notes what this server waits for, and logs it when it is something else
// than before.
func (p *Peer) tell(ctx context.Context, waiting string) {
	if p.Waiting() == waiting {
		return
	}
	p.waiting.Store(&waiting)
	if waiting == "" {
		p.log.InfoContext(ctx, "this server is a member of the cluster", slog.String("id", p.cfg.ID))
		return
	}
	p.log.InfoContext(ctx, "this server is no member of a cluster yet", slog.String("waiting", waiting))
}

// run returns nil when ctx ends, and an error when the disk does not keep promises.
func (s *seeker) run(ctx context.Context, prune func(keep func(Member) bool)) error {
	last, wait := "", seekFirst
	var leaderless time.Time
	var known []Server
	for ctx.Err() == nil {
		changed := s.cluster.Changed()
		now, err := s.step(ctx, &leaderless)
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			break // what failed did so because of that
		}
		s.tell(ctx, now)
		servers := s.cluster.Servers()
		if now == "" && !slices.EqualFunc(servers, known, sameServer) {
			known = servers
			prune(func(m Member) bool {
				return slices.ContainsFunc(servers, func(s Server) bool { return s.ID == m.ID && s.Address == m.Address })
			})
		}
		wait = min(2*wait, seekMax)
		if now != last {
			last, wait = now, seekFirst
		}
		timer := time.NewTimer(wait/2 + rand.N(wait)) //nolint:gosec // jitter
		select {
		case <-timer.C:
		case <-changed:
		case <-s.met.more:
			wait = seekFirst
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil //nolint:nilerr // ctx has ended, and an error of the disk was returned
}

func sameServer(a, b Server) bool { return a.ID == b.ID && a.Address == b.Address }

// step does what there is to do, and tells what this server waits for: "" when it
// is a member. An error is the disk's.
func (s *seeker) step(ctx context.Context, leaderless *time.Time) (waiting string, err error) {
	if !s.cluster.Member() {
		return s.round(ctx)
	}
	if err := s.promises.done(); err != nil {
		return "", err
	}
	leader, address := s.cluster.Leader()
	servers := s.cluster.Servers()
	i := slices.IndexFunc(servers, func(m Server) bool { return m.ID == s.id })
	moved := i >= 0 && servers[i].Address != s.address
	if leader == "" {
		if leaderless.IsZero() {
			*leaderless = time.Now()
		}
		if moved || time.Since(*leaderless) > lostAfter {
			return s.lost(ctx, servers), nil
		}
		return "", nil
	}
	*leaderless = time.Time{}
	if !moved || leader == s.id { // a leader corrects its own
		return "", nil
	}
	r, err := s.calls.join(ctx, Member{ID: leader, Address: address}, &meshpb.PeerJoinRequest{Id: s.id, Address: s.address})
	if err == nil && r.GetRefused() != "" {
		err = errors.New(r.GetRefused())
	}
	if err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "the address of this server could not be changed", slog.String("from", servers[i].Address),
			slog.String("to", s.address), slog.Any("error", err))
	}
	return "", nil
}

// lost asks whether the cluster goes on without this server, or looks for it at
// another address, and then asks it to take this one again. That it says hello
// tells the others where it is.
func (s *seeker) lost(ctx context.Context, servers []Server) string {
	replies, _ := s.greet(ctx, servers)
	for _, r := range replies {
		leads := slices.ContainsFunc(r.GetServers(), func(k *meshpb.KnownServer) bool { return k.GetLeader() })
		knows := slices.ContainsFunc(r.GetServers(), func(k *meshpb.KnownServer) bool {
			return k.GetId() == s.id && k.GetAddress() == s.address
		})
		if !r.GetMember() || !leads || knows {
			continue
		}
		return s.ask(ctx, r, servers)
	}
	return ""
}

// greet says hello to all servers that this one has heard of, and tells who can't
// be reached.
func (s *seeker) greet(ctx context.Context, servers []Server) (replies []*meshpb.Introduction, missing []string) {
	targets, missing := s.find(ctx)
	targets = slices.Clone(targets)
	missing = slices.Clone(missing)
	extra := s.met.addresses()
	for _, m := range servers {
		extra = append(extra, m.Address)
	}
	named := len(targets)
	for _, address := range extra {
		if !slices.Contains(targets, address) {
			targets = append(targets, address)
		}
	}
	own := s.introduce()
	found := make([]*meshpb.Introduction, len(targets))
	errs := make([]error, len(targets))
	s.each(len(targets), func(i int) {
		if targets[i] != s.address {
			found[i], errs[i] = s.calls.hello(ctx, Member{Address: targets[i]}, own)
		}
	})
	byID := map[string]*meshpb.Introduction{}
	for i, target := range targets {
		switch r := found[i]; {
		case errs[i] != nil && i < named:
			missing = append(missing, target+": "+errs[i].Error())
		case r == nil || r.GetId() == s.id:
		default:
			byID[r.GetId()] = r
			s.met.heard(Member{ID: r.GetId(), Address: r.GetAddress()}, true, time.Now())
			for _, k := range r.GetServers() {
				s.met.heard(Member{ID: k.GetId(), Address: k.GetAddress()}, false, time.Now())
			}
		}
	}
	for _, r := range byID {
		replies = append(replies, r)
	}
	slices.SortFunc(replies, func(a, b *meshpb.Introduction) int { return strings.Compare(a.GetId(), b.GetId()) })
	return replies, missing
}

// round is one try of a server that is no member.
func (s *seeker) round(ctx context.Context) (waiting string, err error) {
	servers := s.cluster.Servers()
	held := s.promises.current()
	if held.Complete && len(held.Joining) == 0 && len(servers) == 0 {
		return s.found(ctx, held.Servers), nil
	}
	replies, missing := s.greet(ctx, servers)
	for _, r := range replies {
		if r.GetMember() && len(r.GetServers()) > 0 {
			return s.join(ctx, r)
		}
	}
	switch {
	case len(servers) > 0:
		return "the cluster that has removed it, to be taken again" + because(missing), nil
	case s.expect == 0 || len(held.Joining) > 0:
		return "a cluster to join" + because(missing), nil
	default:
		return s.gather(ctx, held, replies, missing)
	}
}

func because(missing []string) string {
	if len(missing) == 0 {
		return ""
	}
	return "; " + strings.Join(missing, "; ")
}

// join asks the cluster of a member to take this server.
func (s *seeker) join(ctx context.Context, member *meshpb.Introduction) (waiting string, err error) {
	var ids []string
	for _, k := range member.GetServers() {
		ids = append(ids, k.GetId())
	}
	if slices.Contains(ids, s.id) {
		return fmt.Sprintf("the leader of the cluster of %s, which has it in its list", member.GetId()), nil
	}
	if err := s.promises.joining(ids); errors.Is(err, errPromised) {
		return err.Error(), nil
	} else if err != nil {
		return "", err
	}
	return s.ask(ctx, member, s.cluster.Servers()), nil
}

// ask has a member hand the request to join to its leader. Servers are those of
// the state that this server still has.
func (s *seeker) ask(ctx context.Context, member *meshpb.Introduction, servers []Server) (waiting string) {
	r, err := s.calls.join(ctx, Member{ID: member.GetId(), Address: member.GetAddress()}, &meshpb.PeerJoinRequest{Id: s.id, Address: s.address})
	switch {
	case err != nil:
		return fmt.Sprintf("the cluster of %s: %v", member.GetId(), err)
	case r.GetRefused() == "":
		return fmt.Sprintf("the leader, %s, which takes it", r.GetLeader())
	case r.GetRemoved() && len(servers) > 0:
		s.cluster.Removed()
	}
	return fmt.Sprintf("the cluster of %s refuses it: %s", member.GetId(), r.GetRefused())
}

// gather looks whether there are enough servers to found a cluster, and whether it
// is this server that does.
func (s *seeker) gather(ctx context.Context, held promise, replies []*meshpb.Introduction, missing []string) (waiting string, err error) {
	known := []Member{{ID: s.id, Address: s.address}}
	for _, r := range replies {
		switch {
		case Name(r.GetId()) == Name(s.id):
			return fmt.Sprintf("another name: the server at %s is called %s too", r.GetAddress(), Name(s.id)), nil
		case held.Founder == r.GetId() && r.GetBlank() && r.GetAttempt() != held.Attempt:
			// It says itself that it has given up, and never uses that number again.
			if err := s.promises.release(held.Founder, held.Attempt); err != nil {
				return "", err
			}
			held = s.promises.current()
		}
		if r.GetBlank() {
			known = append(known, Member{ID: r.GetId(), Address: r.GetAddress()})
		}
	}
	slices.SortFunc(known, func(a, b Member) int {
		return cmp.Or(strings.Compare(Name(a.ID), Name(b.ID)), strings.Compare(a.ID, b.ID))
	})
	for i := range known[1:] {
		if Name(known[i].ID) == Name(known[i+1].ID) {
			return fmt.Sprintf("one name for each: the servers at %s and %s are both called %s", known[i].Address, known[i+1].Address, Name(known[i].ID)), nil
		}
	}
	have := make([]string, 0, len(known))
	for _, m := range known {
		have = append(have, Name(m.ID))
	}
	text := fmt.Sprintf("%d servers: have %s%s", s.expect, strings.Join(have, " "), because(missing))
	switch {
	case held.Founder != "" && held.Founder != s.id:
		return fmt.Sprintf("%s, which it has promised to found a cluster with; %s", Name(held.Founder), text), nil
	case len(known) < s.expect:
		return text, nil
	case len(known)+len(missing) >= 2*s.expect && len(missing) > 0:
		// The others may be enough for a cluster of their own.
		return fmt.Sprintf("all that retry_join names, as they are %d or more; %s", 2*s.expect, text), nil
	}
	list := known[:s.expect]
	if list[0].ID != s.id {
		all := held.Founder == s.id && !slices.ContainsFunc(held.Servers, func(m Member) bool { return !slices.Contains(known, m) })
		if !all {
			return fmt.Sprintf("%s, the lowest of their names, to found the cluster; %s", have[0], text), nil
		}
		list = held.Servers
	}
	return s.attempt(ctx, slices.Clone(list))
}

// attempt asks all others for their promise, and founds the cluster with it.
func (s *seeker) attempt(ctx context.Context, list []Member) (waiting string, err error) {
	number, list, complete, err := s.promises.begin(list)
	if errors.Is(err, errPromised) {
		return "the founder that it has promised to", nil
	}
	if err != nil {
		return "", err
	}
	if complete {
		return s.found(ctx, list), nil
	}
	request := &meshpb.PromiseRequest{Founder: s.id, Attempt: number, Expect: int32(s.expect)} //nolint:gosec // a number of servers
	for _, m := range list {
		request.Servers = append(request.Servers, &meshpb.KnownServer{Id: m.ID, Address: m.Address, Voter: true})
	}
	answers := make([]*meshpb.PromiseResponse, len(list))
	errs := make([]error, len(list))
	s.each(len(list), func(i int) {
		if list[i].ID != s.id {
			answers[i], errs[i] = s.calls.promise(ctx, list[i], request)
		}
	})
	var refusals []string
	giveWay := false
	for i, m := range list {
		switch {
		case m.ID == s.id || errs[i] == nil && answers[i].GetPromised():
		case errs[i] != nil:
			refusals = append(refusals, fmt.Sprintf("%s: %v", Name(m.ID), errs[i]))
		default:
			refusals = append(refusals, fmt.Sprintf("%s: %s", Name(m.ID), answers[i].GetReason()))
			giveWay = giveWay || answers[i].GetFounder() != "" && answers[i].GetFounder() != s.id && lower(answers[i].GetFounder(), s.id)
		}
	}
	if len(refusals) > 0 {
		if giveWay {
			if _, err := s.promises.yield(); err != nil {
				return "", err
			}
		}
		return "the promise to found a cluster together; " + strings.Join(refusals, "; "), nil
	}
	if err := s.promises.complete(number); errors.Is(err, errPromised) {
		return "the founder that it has promised to", nil
	} else if err != nil {
		return "", err
	}
	return s.found(ctx, list), nil
}

// found begins the cluster: once, as this server has a state then.
func (s *seeker) found(ctx context.Context, list []Member) (waiting string) {
	if err := s.cluster.Found(ctx, list); err != nil {
		return fmt.Sprintf("the store, which can't found the cluster: %v", err)
	}
	names := make([]string, 0, len(list))
	for _, m := range list {
		names = append(names, m.ID)
	}
	s.log.InfoContext(ctx, "the cluster is founded", slog.Any("servers", names))
	return "the other servers of the new cluster"
}
