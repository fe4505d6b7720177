package check_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/agent/check"
	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/catalog"
)

// kernel is a table of listening sockets. Those in hidden are found only by every
// second look.
type kernel struct {
	mu             sync.Mutex
	listen, hidden []string
	err            error
	looks          int
}

func (k *kernel) set(edit func(*kernel)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	edit(k)
}

func (k *kernel) sockets() ([]procnet.Socket, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.looks++
	if k.err != nil {
		return nil, k.err
	}
	var all []procnet.Socket
	for _, a := range k.listen {
		all = append(all, procnet.Socket{Address: netip.MustParseAddrPort(a)})
	}
	for _, a := range k.hidden {
		if k.looks%2 == 0 {
			all = append(all, procnet.Socket{Address: netip.MustParseAddrPort(a)})
		}
	}
	return all, nil
}

func at(addresses ...string) map[string][]netip.AddrPort {
	ports := map[string][]netip.AddrPort{}
	for _, a := range addresses {
		ports[web] = append(ports[web], netip.MustParseAddrPort(a))
	}
	return ports
}

// watch runs a group with the ports of web until the end of the test.
func watch(t *testing.T, cfg check.Config, ports map[string][]netip.AddrPort) *check.Group {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	g := check.New(cfg)
	g.Set(map[string][]catalog.Check{web: nil})
	g.Watch(ports)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return g
}

// says returns what the states of web say.
func says(g *check.Group) (all []string) {
	for _, s := range g.States(web) {
		all = append(all, s.Name+" "+string(s.Health)+": "+s.Output)
	}
	return all
}

const gone = "listening critical: nobody listens at 127.0.0.1:8080 any more"

// TestWatch walks through the life of applications: what listens at each step, and
// what the instance's states say within a second.
func TestWatch(t *testing.T) {
	t.Parallel()
	type step struct {
		listen, hidden []string
		err            error
		want           []string
	}
	rows := map[string]struct {
		ports []string
		steps []step
	}{
		"never seen: another namespace": {ports: []string{"127.0.0.1:8080"}, steps: []step{
			{},
			{listen: []string{"127.0.0.1:8081", "10.0.0.1:8080"}},
		}},
		"ends and comes back": {ports: []string{"127.0.0.1:8080"}, steps: []step{
			{},
			{listen: []string{"127.0.0.1:8080"}},
			{want: []string{gone}},
			{listen: []string{"127.0.0.1:8080"}},
			{want: []string{gone}},
		}},
		"on every address": {ports: []string{"127.0.0.1:8080"}, steps: []step{
			{listen: []string{"0.0.0.0:8080"}},
			{listen: []string{"[::]:8080"}},
			{listen: []string{"[::ffff:127.0.0.1]:8080"}},
			{listen: []string{"[::1]:8080"}, want: []string{gone}},
		}},
		"one of two ports": {ports: []string{"127.0.0.1:8080", "127.0.0.1:8081"}, steps: []step{
			{listen: []string{"127.0.0.1:8080", "127.0.0.1:8081"}},
			{listen: []string{"127.0.0.1:8081"}},
			{want: []string{"listening critical: nobody listens at 127.0.0.1:8080, 127.0.0.1:8081 any more"}},
		}},
		"overlooked by the first look": {ports: []string{"127.0.0.1:8080"}, steps: []step{
			{listen: []string{"127.0.0.1:8080"}},
			{hidden: []string{"127.0.0.1:8080"}},
		}},
		"blind": {ports: []string{"127.0.0.1:8080"}, steps: []step{
			{listen: []string{"127.0.0.1:8080"}},
			{err: errors.New("no /proc")},
			{want: []string{gone}},
		}},
		"IPv6": {ports: []string{"[::1]:8080"}, steps: []step{
			{listen: []string{"[::]:8080"}},
			{listen: []string{"0.0.0.0:8080"}, want: []string{"listening critical: nobody listens at [::1]:8080 any more"}},
		}},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k := &kernel{}
				g := watch(t, check.Config{Sockets: k.sockets}, at(row.ports...))
				for i, s := range row.steps {
					k.set(func(k *kernel) { k.listen, k.hidden, k.err = s.listen, s.hidden, s.err })
					<-time.After(500 * time.Millisecond)
					if diff := cmp.Diff(s.want, says(g)); diff != "" {
						t.Errorf("step %d (-want +got):\n%s", i, diff)
					}
				}
			})
		})
	}
}

// TestWatchAnnounces: the end of an application wakes who waits for Changed, and
// nothing is looked at for instances without ports.
func TestWatchAnnounces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := &kernel{listen: []string{"127.0.0.1:8080"}}
		g := watch(t, check.Config{Sockets: k.sockets}, nil)
		<-time.After(time.Minute)
		if k.looks != 0 {
			t.Errorf("%d looks without a port", k.looks)
		}
		g.Watch(at("127.0.0.1:8080"))
		<-time.After(time.Second)
		changed, ended := g.Changed(), time.Now()
		k.set(func(k *kernel) { k.listen = nil })
		<-changed
		if took := time.Since(ended); took > 500*time.Millisecond {
			t.Errorf("told after %s", took)
		}
		// Without the port nothing is known of it.
		g.Watch(nil)
		if got := says(g); got != nil {
			t.Errorf("without ports: %v", got)
		}
	})
}

// TestWatchAfterRestart: what the last process saw counts, for the same address.
func TestWatchAfterRestart(t *testing.T) {
	t.Parallel()
	rows := map[string]struct {
		port string
		want []string
	}{
		"the same port":  {"127.0.0.1:8080", []string{gone}},
		"another port":   {"127.0.0.1:8081", nil},
		"another family": {"[::1]:8080", nil},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k := &kernel{listen: []string{"127.0.0.1:8080"}}
				first := watch(t, check.Config{Sockets: k.sockets}, at("127.0.0.1:8080"))
				<-time.After(time.Second)
				earlier := first.All()
				k.set(func(k *kernel) { k.listen = nil }) // ended while no agent ran
				second := watch(t, check.Config{Sockets: k.sockets, Earlier: earlier}, at(row.port))
				<-time.After(time.Second)
				if diff := cmp.Diff(row.want, says(second)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		})
	}
}
