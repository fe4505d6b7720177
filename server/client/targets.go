package client

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// otherServer is how long one of several servers may take to be connected to,
// and to shake hands, before the next one is tried.
const otherServer = 2 * time.Second

// targets are the servers that an address names. They are tried in order, from
// the one that answered last on.
type targets struct {
	hosts []string // host:port
	first atomic.Uint32
}

// parseTargets reads "https://HOST:7400" or a list such as "HOST1,HOST2:7400".
func parseTargets(address string) (*targets, error) {
	t := &targets{}
	for part := range strings.SplitSeq(address, ",") {
		base, err := baseURL(strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		t.hosts = append(t.hosts, strings.TrimPrefix(base, "https://"))
	}
	return t, nil
}

// dial connects to the first server that can be reached.
func (t *targets) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	dialer := net.Dialer{}
	if len(t.hosts) > 1 {
		dialer.Timeout = otherServer
	}
	var errs []string
	var last error
	begin := t.first.Load()
	for i := range t.hosts {
		at := (int(begin) + i) % len(t.hosts)
		conn, err := dialer.DialContext(ctx, network, t.hosts[at])
		if err == nil {
			t.first.Store(uint32(at)) //nolint:gosec // an index
			return conn, nil
		}
		last = err
		errs = append(errs, fmt.Sprintf("%s: %v", t.hosts[at], rootText(err)))
		if ctx.Err() != nil {
			break
		}
	}
	if len(errs) == 1 {
		return nil, last //nolint:wrapcheck // net's own words, which name the address
	}
	return nil, &net.OpError{Op: "dial", Net: network, Err: fmt.Errorf("none of the servers answers: %s", strings.Join(errs, "; "))}
}

// turn makes the next server the first one, and reports whether there is another.
func (t *targets) turn() bool {
	if t == nil || len(t.hosts) < 2 {
		return false
	}
	t.first.Store((t.first.Load() + 1) % uint32(len(t.hosts))) //nolint:gosec // a few
	return true
}

// count returns how many servers there are to ask.
func (t *targets) count() int {
	if t == nil {
		return 1
	}
	return len(t.hosts)
}
