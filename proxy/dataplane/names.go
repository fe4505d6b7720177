package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// nameFresh is how long an answer is used without asking again. The resolver of Go does not tell the TTL; services that move
	// by DNS have one of 5 s or more (Amazon RDS: 5 s).
	nameFresh = 5 * time.Second
	// nameStale is how long it is used while the next one is on its way. What nobody has asked for in so long is waited for.
	nameStale = time.Minute
	// nameAgain is the wait after a lookup that failed.
	nameAgain = time.Second
	// nameLookup bounds a lookup, nameConnect all of it with the connecting.
	nameLookup  = 2 * time.Second
	nameConnect = 3 * time.Second
	// nameStagger is how long one address has before the next one is tried beside it (RFC 8305, section 5, says 250 ms).
	nameStagger = 250 * time.Millisecond
	// maxAddresses of a name are used.
	maxAddresses = 16
	// maxNames bounds what is kept; the names are those of plans.
	maxNames = 1024
)

// errAddress is wrapped when a name leads where nothing outside the mesh is.
var errAddress = errors.New("no usable address")

// names knows the addresses of destinations outside the mesh. A failed lookup takes none of them away.
type names struct {
	log    *slog.Logger
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	tasks  *sync.WaitGroup

	mu    sync.Mutex
	known map[string]*name
}

type name struct {
	addresses []netip.Addr // of the newest good answer, sorted
	answered  time.Time    // when that was
	tried     time.Time    // when the newest lookup ended
	err       error        // what came of it
	running   chan struct{}
	turn      int
}

// lookupHost asks the resolver of the host.
func lookupHost(ctx context.Context, host string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// hostName cuts host:port if the host is a name.
func hostName(address string) (host, port string, named bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", "", false
	}
	_, err = netip.ParseAddr(host)
	return host, port, err != nil
}

// of returns the addresses of a host, each time beginning with another one. It waits for a lookup only where there is no answer
// that is new enough, and returns an old one if nothing better comes.
func (n *names) of(ctx context.Context, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	one := n.known[host]
	if one == nil {
		if len(n.known) >= maxNames {
			clear(n.known)
		}
		one = &name{}
		n.known[host] = one
	}
	now := time.Now()
	age := now.Sub(one.answered)
	if one.running == nil && age >= nameFresh && now.Sub(one.tried) >= nameAgain {
		one.running = make(chan struct{})
		n.tasks.Go(func() { n.resolve(host, one) }) //nolint:contextcheck // whoever asks next wants the answer, too
	}
	running := one.running
	if running != nil && (len(one.addresses) == 0 || age >= nameStale) {
		n.mu.Unlock()
		select {
		case <-running:
		case <-ctx.Done():
		}
		n.mu.Lock()
	}
	defer n.mu.Unlock()
	switch {
	case len(one.addresses) > 0:
		one.turn = (one.turn + 1) % len(one.addresses)
		return slices.Concat(one.addresses[one.turn:], one.addresses[:one.turn]), nil
	case one.err != nil:
		return nil, one.err
	default:
		return nil, fmt.Errorf("look up %s: %w", host, ctx.Err())
	}
}

// resolve looks a host up.
func (n *names) resolve(host string, one *name) {
	ctx, cancel := context.WithTimeout(context.Background(), nameLookup)
	defer cancel()
	found, err := n.lookup(ctx, host)
	if err == nil {
		found, err = usable(host, found)
	}
	if err != nil {
		err = fmt.Errorf("look up %s: %w", host, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	close(one.running)
	one.running = nil
	failed := one.err != nil
	one.tried, one.err = time.Now(), err
	switch {
	case err == nil && !slices.Equal(found, one.addresses):
		n.log.Info("addresses of a destination outside the mesh", slog.String("host", host), slog.Any("addresses", found))
	case err != nil && !failed:
		n.log.Warn("a destination outside the mesh can't be looked up; what is known of it stays in use",
			slog.String("host", host), slog.Any("known", one.addresses), slog.Any("error", err))
	case err == nil && failed:
		n.log.Info("a destination outside the mesh is found again", slog.String("host", host))
	}
	if err == nil {
		one.addresses, one.answered = found, one.tried
	}
}

// usable returns what may be connected to, sorted and each once. A name that is not this host's leads to this host only if
// somebody forges it, and to a link only where a cloud keeps its credentials.
func usable(host string, found []netip.Addr) ([]netip.Addr, error) {
	local := strings.EqualFold(host, "localhost") || strings.HasSuffix(strings.ToLower(host), ".localhost")
	var good []netip.Addr
	for _, a := range found {
		a = a.Unmap()
		if a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsLoopback() && !local {
			continue
		}
		good = append(good, a)
	}
	slices.SortFunc(good, netip.Addr.Compare)
	good = slices.Compact(good)
	if len(good) == 0 {
		return nil, fmt.Errorf("%w among %v: addresses of this host, of a link or of a group are not used", errAddress, found)
	}
	return good[:min(len(good), maxAddresses)], nil
}

// dialName connects to one of the addresses of a host outside the mesh, whichever answers first when they are tried one after
// the other, the next without waiting for the end of the one before.
func (p *Plane) dialName(ctx context.Context, host, port string) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, nameConnect)
	defer cancel()
	addresses, err := p.names.of(ctx, host)
	if err != nil {
		return nil, err
	}
	type result struct {
		conn *net.TCPConn
		err  error
	}
	results := make(chan result, len(addresses))
	next, pending := 0, 0
	try := func() {
		address := net.JoinHostPort(addresses[next].String(), port)
		next, pending = next+1, pending+1
		p.tasks.Go(func() {
			conn, err := p.dialAddress(ctx, address)
			results <- result{conn, err}
		})
	}
	try()
	stagger := time.NewTicker(nameStagger)
	defer stagger.Stop()
	var failed []error
	for {
		select {
		case r := <-results:
			pending--
			if r.err == nil {
				p.tasks.Go(func() { // those that are late
					for range pending {
						if late := <-results; late.conn != nil {
							_ = late.conn.Close()
						}
					}
				})
				return r.conn, nil
			}
			failed = append(failed, r.err)
			if next == len(addresses) && pending == 0 {
				return nil, fmt.Errorf("connect to %s: %w", host, errors.Join(failed...))
			}
			if next < len(addresses) {
				try()
				stagger.Reset(nameStagger)
			}
		case <-stagger.C:
			if next < len(addresses) {
				try()
			}
		}
	}
}
