package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
)

// PinnedRoots asks the servers at an address for their roots, and returns those
// whose hash is the given one. The connection proves nothing, and nothing secret is
// sent over it: only the hash, which must have come another way, says that the
// roots are right. Whoever stands in between can't make others with the same hash.
func PinnedRoots(ctx context.Context, address string, pin ca.Hash) (ca.Bundle, error) {
	if strings.HasPrefix(address, "unix://") {
		return ca.Bundle{}, fmt.Errorf("address %s: a unix socket needs no roots", address)
	}
	t, err := parseTargets(address)
	if err != nil {
		return ca.Bundle{}, err
	}
	c := overTLS(t, defaultTimeout, &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // what comes is compared with the pin; nothing secret goes
	})
	defer c.http.CloseIdleConnections()
	all, err := c.Roots(ctx)
	if err != nil {
		return ca.Bundle{}, err
	}
	var have []string
	for _, domain := range all.TrustDomains() {
		hash := all.Hash(domain)
		if hash == pin {
			return ca.NewBundle(domain, all.Roots(domain)...)
		}
		have = append(have, fmt.Sprintf("%s has %s", domain, hash))
	}
	return ca.Bundle{}, &Error{
		Code:    CodeUnreachable,
		Message: fmt.Sprintf("the server at %s is not the one of the fingerprint %s: its trust domain %s", address, pin, strings.Join(have, ", ")),
		Next:    "compare it with what \"meshd server fingerprint\" prints on the server; if that is what you gave, somebody stands in between",
	}
}

// ParseFingerprint reads a fingerprint, with or without "sha256:" before it.
func ParseFingerprint(s string) (ca.Hash, error) {
	const algorithm = "sha256:"
	return ca.ParseHash(algorithm + strings.ToLower(strings.TrimPrefix(strings.TrimSpace(s), algorithm)))
}

func overTLS(t *targets, timeout time.Duration, config *tls.Config) *Client {
	c := &Client{timeout: timeout, base: "https://" + t.hosts[0], targets: t}
	transport := newTransport(timeout)
	transport.DialContext = t.dial
	if len(t.hosts) > 1 {
		transport.TLSHandshakeTimeout = min(timeout, otherServer)
	}
	transport.TLSClientConfig = config
	c.http = newHTTP(transport)
	return c
}
