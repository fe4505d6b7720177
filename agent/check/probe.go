package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/catalog"
)

// ErrForbiddenAddress is wrapped when a check's target is, or resolves to, an
// address that checks must not reach.
var ErrForbiddenAddress = errors.New("checks must not reach this address")

// Resolver finds the addresses of a host name.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// metadataAddresses serve credentials to whoever asks from the host and lie
// outside the link-local ranges: AWS and GCP over IPv6, Alibaba, Oracle, and
// Azure's wire server.
func metadataAddresses() []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr("fd00:ec2::254"),
		netip.MustParseAddr("fd20:ce::254"),
		netip.MustParseAddr("100.100.100.200"),
		netip.MustParseAddr("192.0.0.192"),
		netip.MustParseAddr("168.63.129.16"),
	}
}

// prober runs http and tcp checks.
type prober struct {
	resolver Resolver
	dialer   net.Dialer
}

// probe runs the check once, within its timeout.
func (p *prober) probe(ctx context.Context, c catalog.Check) result {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout.Std())
	defer cancel()
	if c.Kind() == catalog.CheckHTTP {
		return p.http(ctx, c)
	}
	return p.tcp(ctx, c)
}

func (p *prober) tcp(ctx context.Context, c catalog.Check) result {
	conn, err := p.dial(ctx, c.TCP)
	if err != nil {
		return critical("TCP connect %s: %s", c.TCP, cause(ctx, c, err))
	}
	_ = conn.Close()
	return result{health: catalog.HealthPassing, output: "TCP connect " + c.TCP + ": success"}
}

func (p *prober) http(ctx context.Context, c catalog.Check) result {
	what := "HTTP " + c.Method + " " + c.HTTP + ": "
	req, err := http.NewRequestWithContext(ctx, c.Method, c.HTTP, http.NoBody)
	if err != nil {
		return critical("%s%v", what, err)
	}
	for name, values := range c.Header {
		req.Header[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", "meshd health check")
	}
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "text/plain, text/*, */*")
	}
	client := p.client()
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return critical("%s%s", what, cause(ctx, c, err))
	}
	defer func() { _ = resp.Body.Close() }()
	// The status is the verdict: a body that can't be read only shortens the
	// output.
	body, _ := io.ReadAll(io.LimitReader(resp.Body, MaxOutput))
	output := what + resp.Status
	if text := strings.TrimSpace(string(body)); text != "" {
		output += "\n" + text
	}
	return result{health: httpHealth(resp.StatusCode), output: output}
}

// client returns a client for one run: a connection of its own, no proxy, no
// redirects.
func (p *prober) client() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				return p.dial(ctx, address)
			},
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: 32 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// httpHealth is Consul's reading of a status code.
func httpHealth(code int) catalog.Health {
	switch {
	case code >= 200 && code <= 299:
		return catalog.HealthPassing
	case code == http.StatusTooManyRequests:
		return catalog.HealthWarning
	default:
		return catalog.HealthCritical
	}
}

// dial resolves the host once, refuses if any answer is a forbidden address,
// and connects to the answers in turn: what was judged is what is dialed.
func (p *prober) dial(ctx context.Context, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("target %q: %w", address, err)
	}
	addrs, err := p.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	for _, addr := range addrs {
		conn, err = p.dialer.DialContext(ctx, "tcp", net.JoinHostPort(addr.String(), port))
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

func (p *prober) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	addrs := []netip.Addr{}
	if addr, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, addr)
	} else if addrs, err = p.resolver.LookupNetIP(ctx, "ip", host); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", host, err)
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("resolve %s: no address", host)
	}
	for i, addr := range addrs {
		addr = addr.Unmap()
		if forbidden(addr) {
			return nil, fmt.Errorf("%s is %s: %w", host, addr, ErrForbiddenAddress)
		}
		addrs[i] = addr
	}
	return addrs, nil
}

// forbidden tells the addresses where metadata and other hosts' link-local
// services live. An IPv6 zone does not matter to the comparison.
func forbidden(addr netip.Addr) bool {
	addr = addr.WithZone("")
	return addr.IsLinkLocalUnicast() || addr.IsMulticast() || slices.Contains(metadataAddresses(), addr)
}

// cause says why a run failed, without the URL that the caller names already.
func cause(ctx context.Context, c catalog.Check, err error) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "no answer within " + c.Timeout.String()
	}
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return err.Error()
}

func critical(format string, args ...any) result {
	return result{health: catalog.HealthCritical, output: fmt.Sprintf(format, args...)}
}

// expired is the result of a TTL check that nobody reported to in time.
func expired(ttl time.Duration, last string) result {
	output := "no report within " + ttl.String()
	if last != "" {
		output += "; the last one said: " + last
	}
	return result{health: catalog.HealthCritical, output: output}
}
