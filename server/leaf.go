package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// leafRetry is the pause after a failed issue of the server's own certificate.
const leafRetry = 30 * time.Second

// leaf is the server's own certificate, renewed at half of its life.
type leaf struct {
	id        spiffe.ID
	names     []string
	ips       []net.IP
	authority *authority
	log       *slog.Logger
	now       atomic.Pointer[presented]
}

type presented struct {
	leaf   *ca.Leaf
	tls    *tls.Certificate
	bundle ca.Bundle
}

func newLeaf(id spiffe.ID, hosts []string, authority *authority, log *slog.Logger) *leaf {
	l := &leaf{id: id, authority: authority, log: log}
	for _, host := range hosts {
		host = strings.ToLower(strings.TrimSuffix(host, "."))
		if ip := net.ParseIP(host); ip != nil {
			if !ip.IsUnspecified() && !slices.ContainsFunc(l.ips, ip.Equal) {
				l.ips = append(l.ips, ip)
			}
			continue
		}
		// A name that no certificate can carry is left out: agents go by the SPIFFE ID.
		if _, err := spiffe.ParseTrustDomain(host); err == nil && !slices.Contains(l.names, host) {
			l.names = append(l.names, host)
		}
	}
	return l
}

// certificateHosts lists under which names and addresses curl and browsers may
// reach the server.
func certificateHosts(config Config, name, advertised string) []string {
	hosts := []string{"localhost", "127.0.0.1", "::1", name, advertised, config.Bind}
	if host, err := os.Hostname(); err == nil {
		hosts = append(hosts, host)
	}
	return hosts
}

// issue gets a new certificate and presents it from now on.
func (l *leaf) issue(ctx context.Context) error {
	key, err := ca.GenerateKey()
	if err != nil {
		return fmt.Errorf("certificate of this server: %w", err)
	}
	bundle := l.authority.Bundle()
	chain, err := l.authority.Sign(ctx, ca.SignRequest{PublicKey: key.Public(), ID: l.id, DNSNames: l.names, IPs: l.ips})
	if err != nil {
		return fmt.Errorf("certificate of this server: %w", err)
	}
	made, err := ca.NewLeaf(chain, key)
	if err != nil {
		return fmt.Errorf("certificate of this server: %w", err)
	}
	l.now.Store(&presented{leaf: made, tls: made.TLSWithRoots(bundle), bundle: bundle})
	return nil
}

// certificate is what listeners present: with the roots, so that a host that has
// only a join token can check their hash.
func (l *leaf) certificate(string) (*tls.Certificate, error) {
	p := l.now.Load()
	if p == nil {
		return nil, ca.ErrNoLeaf
	}
	return p.tls, nil
}

// run renews until ctx ends: at half-life, and at once when the roots are others.
func (l *leaf) run(ctx context.Context) error {
	for {
		current := l.now.Load()
		wait := min(time.Until(current.leaf.RenewAt(rand.Float64())), time.Hour) //nolint:gosec // jitter needs no secrecy
		timer := time.NewTimer(max(wait, 0))
		changed := l.authority.state.Changed(l.authority.state.Snapshot())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		due := !time.Now().Before(current.leaf.RenewAt(0.5)) //nolint:mnd // the middle of the jitter
		if !due && l.authority.Bundle().Equal(current.bundle) {
			continue
		}
		if err := l.issue(ctx); err != nil {
			l.log.ErrorContext(ctx, "the server's certificate could not be renewed; trying again", slog.Any("error", err))
			if !pause(ctx, leafRetry) {
				return nil
			}
		}
	}
}

// pause reports whether ctx still runs after d.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
