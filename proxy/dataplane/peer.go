package dataplane

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

const (
	// renewMargin is how long before the end of a peer's certificate the pools to it are replaced. Only the side that sends
	// requests can leave a kept connection without a race: it must do so first, and clocks may be 5 min apart.
	renewMargin = 6 * time.Minute
	// renewPause is the least time between two replacements of a pool: the peer may have no newer certificate.
	renewPause = time.Minute
	// drainMargin is how long before the end the side that answers asks callers to leave.
	drainMargin = 10 * time.Second
)

// proof is what made a TLS connection trusted. The zero proof is that of a plain connection, which needs none.
type proof struct {
	raw   [][]byte // the peer's chain as it was presented
	usage x509.ExtKeyUsage
	until time.Time // the earliest end of a certificate of either side; zero is never
}

// newProof takes note of a finished handshake, in which own was presented.
func newProof(cs tls.ConnectionState, own *ca.Leaf, usage x509.ExtKeyUsage) proof {
	pr := proof{usage: usage}
	for _, cert := range cs.PeerCertificates {
		pr.raw = append(pr.raw, cert.Raw)
		if pr.until.IsZero() || cert.NotAfter.Before(pr.until) {
			pr.until = cert.NotAfter
		}
	}
	if own != nil && own.NotAfter().Before(pr.until) {
		pr.until = own.NotAfter()
	}
	return pr
}

// review holds the peer's chain against the roots of a snapshot. verdicts are those of this review by leaf: many connections
// have the same peer.
func (pr *proof) review(now time.Time, s *snapshot, verdicts map[string]error) Reason {
	if len(pr.raw) == 0 {
		return ""
	}
	err, known := verdicts[string(pr.raw[0])]
	if !known {
		_, _, err = ca.VerifyPeer(s.config.Bundle, pr.raw, now, pr.usage, ca.AcceptAny)
		verdicts[string(pr.raw[0])] = err
	}
	if err != nil {
		return ReasonUntrusted
	}
	return ""
}

func (pr *proof) expired(now time.Time) bool { return !pr.until.IsZero() && now.After(pr.until) }

// dialedConn is the TCP connection under the TLS of a connection to another proxy. It is in the set of all such from the end
// of its handshake until it is closed, by whomever.
type dialedConn struct {
	*sock.Conn
	set   *dialedSet
	proof proof
}

// Close closes the connection.
func (d *dialedConn) Close() error {
	d.set.remove(d)
	return d.Conn.Close()
}

// dialedSet holds the connections to other proxies, pooled ones included.
type dialedSet struct {
	mu    sync.Mutex
	conns map[*dialedConn]struct{}
}

func (s *dialedSet) add(d *dialedConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		s.conns = map[*dialedConn]struct{}{}
	}
	s.conns[d] = struct{}{}
}

func (s *dialedSet) remove(d *dialedConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, d)
}

func (s *dialedSet) all() []*dialedConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*dialedConn, 0, len(s.conns))
	for d := range s.conns {
		out = append(out, d)
	}
	return out
}

func (s *dialedSet) closeAll() {
	for _, d := range s.all() {
		reset(d)
	}
}

// stale reports whether the pool has, or may have, connections whose peer's certificate ends soon.
func (e *endpoint) stale(now time.Time) bool {
	until := e.expires.Load()
	return e.web() && until != 0 && now.After(time.Unix(until, 0).Add(-renewMargin)) && now.Sub(e.made) > renewPause
}

// review resets the connections whose peer is not trusted any more. Those of TCP sessions are looked after by their link, which
// knows when they are idle; those of pools were
// replaced before, so that what is left long after is stuck.
func (s *dialedSet) review(now time.Time, snap *snapshot, bundleChanged bool, verdicts map[string]error) {
	for _, d := range s.all() {
		if now.After(d.proof.until.Add(expiryGrace)) || bundleChanged && d.proof.review(now, snap, verdicts) != "" {
			reset(d)
		}
	}
}

// clientConfig is how to begin TLS with an endpoint.
func (p *Plane) clientConfig(e *endpoint, alpn []string) *tls.Config {
	source := e.key.source
	return ca.ClientConfig(ca.ClientOptions{
		Leaf:       func() (*tls.Certificate, error) { return p.current().certificate(source) },
		Bundle:     p.bundle,
		Accept:     ca.Expect(e.key.service),
		ServerName: e.key.serverName,
		ALPN:       alpn,
	})
}

// dialMesh connects to an endpoint: TLS, in which the peer proves that it is the endpoint's service, and both
// agree on a protocol of alpn.
func (p *Plane) dialMesh(ctx context.Context, e *endpoint, alpn []string) (conn *record.Conn, agreed string, err error) {
	before := p.current()
	tc, err := p.dialTCP(ctx, e.address)
	if err != nil {
		return nil, "", err
	}
	d := &dialedConn{Conn: sock.New(tc), set: &p.dialed}
	ctx, cancel := context.WithTimeout(ctx, p.limits.HandshakeTimeout)
	defer cancel()
	conn, cs, err := record.Client(ctx, d, p.clientConfig(e, alpn))
	if err != nil {
		reset(d)
		return nil, "", fmt.Errorf("connect to %s (%s): %w", e.address, e.key.serverName, err)
	}
	if !slices.Contains(alpn, cs.NegotiatedProtocol) {
		reset(d)
		return nil, "", fmt.Errorf("connect to %s (%s): the proxy there speaks %q, want %q", e.address, e.key.serverName, cs.NegotiatedProtocol, alpn)
	}
	d.proof = newProof(cs, nil, x509.ExtKeyUsageServerAuth)
	p.dialed.add(d)
	e.expires.Store(min(d.proof.until.Unix(), cmp.Or(e.expires.Load(), d.proof.until.Unix())))
	// The bundle may have changed since the handshake looked at it, before the connection was in the set.
	if s := p.current(); s != before && d.proof.review(time.Now(), s, map[string]error{}) != "" {
		reset(d)
		return nil, "", fmt.Errorf("connect to %s (%s): %w", e.address, e.key.serverName, ca.ErrUntrusted)
	}
	return conn, cs.NegotiatedProtocol, nil
}
