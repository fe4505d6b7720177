package planted_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/tests/fault/faultfs"
	"github.com/meshd/meshd/tests/fault/history"
)

// decision bounds the search for an order of a history.
const decision = 20 * time.Second

// scenario runs something that is right without the bug, and returns what the
// checkers say to what was seen.
type scenario struct {
	bug  fault.Name
	kind string // of the violation, a regular expression
	run  func(t *testing.T) error
}

func scenarios() []scenario {
	return []scenario{
		{fault.SkipFsync, "no order explains", powerLoss},
		{fault.AnswerBeforeCommit, "no order explains", lostLeader},
		{fault.ReuseRevision, `revision \d+ of \S+ is both`, contention},
		{fault.DropDeletion, "it was deleted at", deletions},
		{fault.StaleAsLinearizable, "no order explains", cutReader},
		{fault.ForgetVote, "two leaders", voteTwice},
		{fault.ApplyTwice, "no order explains", contention},
		{fault.LoseLastSnapshotEntry, "no order explains", restart},
		{fault.SkipCatchUp, "no order explains", slowFollower},
		{fault.IgnoreChecks, "no order explains", contention},
	}
}

func asIs(*raftstore.Config) {}

// contention: clients of three members compare and set a few keys.
func contention(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 3, asIs), history.New()
	done := make(chan struct{})
	for id := range 4 {
		go func() {
			defer func() { done <- struct{}{} }()
			one, rnd := newClient(t, log, id), rand.New(rand.NewPCG(1, uint64(id)))
			for range 60 {
				key, m := fmt.Sprintf("k%d", rnd.IntN(2)), c.all[rnd.IntN(len(c.all))]
				if rnd.IntN(3) == 0 {
					one.read(m, key, true)
				} else {
					one.write(m, key)
				}
			}
		}()
	}
	for range 4 {
		<-done
	}
	last := newClient(t, log, 9)
	for i, m := range c.all {
		last.read(m, fmt.Sprintf("k%d", i%2), true)
	}
	alone := newClient(t, log, 10)
	for range 20 { // nobody between two writes of a key: what comes again behind the next one, as every 16th may, is read
		alone.write(c.all[0], "k9")
		alone.read(c.all[0], "k9", true)
	}
	return history.Check(log.Ops(), decision)
}

// powerLoss: a server's disk forgets what was not synced.
func powerLoss(t *testing.T) error {
	t.Helper()
	dir, disk := t.TempDir(), faultfs.New()
	if err := disk.Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := disk.Unmount(); err != nil {
			t.Error(err)
		}
	})
	c, log := newMembers(t, 1, func(cfg *raftstore.Config) { cfg.Dir, cfg.SnapshotEntries = filepath.Join(dir, "state"), 1<<20 }), history.New()
	one := newClient(t, log, 0)
	one.write(c.all[0], "k")
	writeBack(t, dir)
	one.write(c.all[0], "k")
	c.stop(c.all[0])
	if _, err := disk.PowerLoss(faultfs.Drop, rand.New(rand.NewPCG(1, 1))); err != nil {
		t.Fatal(err)
	}
	c.start(c.all[0])
	c.serves(c.all[0])
	one.read(c.all[0], "k", true)
	return history.Check(log.Ops(), decision)
}

// writeBack syncs everything, as the kernel does with what is some seconds old.
func writeBack(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// lostLeader: a leader that is cut off is asked to write; then the others.
func lostLeader(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 3, asIs), history.New()
	one := newClient(t, log, 0)
	old := c.leader(c.all...)
	one.write(old, "k")
	c.cut(old)
	one.write(old, "k")
	next := c.leader(c.but(old)...)
	c.serves(next)
	one.read(next, "k", true)
	return history.Check(log.Ops(), decision)
}

// cutReader: a member that is cut off is asked for the newest state.
func cutReader(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 3, asIs), history.New()
	writer, reader := newClient(t, log, 0), newClient(t, log, 1)
	leader := c.leader(c.all...)
	follower := c.but(leader)[0]
	writer.write(leader, "k")
	reader.read(follower, "k", true)
	c.cut(follower)
	writer.write(leader, "k")
	reader.read(follower, "k", true)
	return history.Check(log.Ops(), decision)
}

// slowFollower: a client writes through a member that hears nothing from the
// leader, and reads there.
func slowFollower(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 3, func(cfg *raftstore.Config) { cfg.HeartbeatTimeout, cfg.ElectionTimeout = 2*time.Second, 2*time.Second }), history.New()
	one := newClient(t, log, 0)
	follower := c.but(c.leader(c.all...))[0]
	one.write(follower, "k")
	c.cut(follower)
	one.write(follower, "k")
	one.read(follower, "k", false)
	return history.Check(log.Ops(), decision)
}

// deletions: a watcher that is slow gets deletions together with writes.
func deletions(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 1, asIs), history.New()
	m, one := c.all[0], newClient(t, log, 0)
	for i := range 4 {
		one.write(m, fmt.Sprintf("k%d", i))
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	w := m.Watch(ctx, "", store.Position{})
	_, at := stateOf(t, m)
	trace := watch(t, w, at)
	one.remove(m, "k1")
	one.write(m, "k2")
	one.remove(m, "k3")
	final, at := stateOf(t, m)
	trace.Batches = append(trace.Batches, again(watch(t, w, at))...)
	return errors.Join(history.Check(log.Ops(), decision), history.CheckWatch(trace, log.Ops(), nil, final))
}

// again returns the batches of a watch that went on.
func again(trace history.Trace) []history.Batch {
	trace.Batches[0].Again = false
	return trace.Batches
}

// restart: a server reads its state back from what it has saved.
func restart(t *testing.T) error {
	t.Helper()
	c, log := newMembers(t, 1, asIs), history.New()
	m, one := c.all[0], newClient(t, log, 0)
	saved := func() bool {
		found, err := filepath.Glob(m.cfg.Dir + "/snapshots/*-*-*/state.bin")
		return err == nil && len(found) > 0 && !strings.Contains(strings.Join(found, ""), ".tmp")
	}
	keys := 0
	for end := time.Now().Add(patience); !saved(); keys++ {
		one.write(m, fmt.Sprintf("k%d", keys))
		if time.Now().After(end) {
			t.Fatal("no state was saved")
		}
	}
	c.stop(m)
	c.start(m)
	c.serves(m)
	for i := range keys {
		one.read(m, fmt.Sprintf("k%d", i), true)
	}
	return history.Check(log.Ops(), decision)
}

var errTwoLeaders = errors.New("two leaders")

// voteTwice: two candidates of one term ask a member for its vote, which is
// started anew in between.
func voteTwice(t *testing.T) error {
	t.Helper()
	c := &members{t: t}
	voter := &member{cfg: config(filepath.Join(t.TempDir(), "state"), "voter")}
	c.all = []*member{voter}
	c.start(voter)
	list := []raftstore.Member{{ID: "voter", Address: string(voter.inner.LocalAddr())}}
	candidates := map[string]*raft.InmemTransport{}
	for _, name := range []string{"one", "other"} {
		address, transport := raft.NewInmemTransport("")
		candidates[name] = transport
		list = append(list, raftstore.Member{ID: name, Address: string(address)})
	}
	if err := voter.Found(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	const term = 100
	leaders := []string{}
	for _, name := range []string{"one", "other"} {
		from := candidates[name]
		from.Connect(voter.inner.LocalAddr(), voter.inner)
		request := &raft.RequestVoteRequest{
			RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(name), Addr: from.EncodePeer(raft.ServerID(name), from.LocalAddr())},
			Term:      term, LastLogIndex: 1000, LastLogTerm: term - 1, LeadershipTransfer: true,
		}
		var reply raft.RequestVoteResponse
		if err := from.RequestVote("voter", voter.inner.LocalAddr(), request, &reply); err != nil {
			t.Fatal(err)
		}
		if reply.Granted { // with its own vote that is two of three
			leaders = append(leaders, name)
		}
		c.stop(voter)
		c.start(voter)
	}
	if len(leaders) == 0 {
		t.Fatal("the voter voted for nobody")
	}
	if len(leaders) > 1 {
		return fmt.Errorf("%w: %w in term %d: %s", history.ErrViolation, errTwoLeaders, term, strings.Join(leaders, " and "))
	}
	return nil
}

// TestScenario holds each scenario against the checkers. They find nothing, unless
// the bug of that name is planted in this build.
func TestScenario(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(string(s.bug), func(t *testing.T) {
			if err := s.run(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPlanted plants each bug and wants its scenario to find it: a violation of the
// right kind.
func TestPlanted(t *testing.T) {
	if fault.Enabled {
		t.Skip("this is the build that the test below runs")
	}
	built := program(t)
	all := fault.Bugs()
	for _, s := range scenarios() {
		all = slices.DeleteFunc(all, func(bug fault.Name) bool { return bug == s.bug })
		t.Run(string(s.bug), func(t *testing.T) {
			for _, row := range []struct {
				bug    fault.Name
				passes bool
			}{{"", true}, {s.bug, false}} {
				cmd := exec.CommandContext(t.Context(), built, "-test.run=^TestScenario$/^"+string(s.bug)+"$", "-test.v")
				cmd.Env = append(os.Environ(), fault.EnvBugs+"="+string(row.bug))
				out, err := cmd.CombinedOutput()
				if row.passes != (err == nil) {
					t.Fatalf("bug %q: %v\n%s", row.bug, err, out)
				}
				if want := regexp.MustCompile(regexp.QuoteMeta(history.ErrViolation.Error()) + `[\s\S]*` + s.kind); !row.passes && !want.Match(out) {
					t.Fatalf("bug %q: it fails without %q:\n%s", row.bug, want, out)
				}
			}
		})
	}
	if len(all) > 0 {
		t.Errorf("no scenario finds %v", all)
	}
}
