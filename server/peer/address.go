package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	errID      = errors.New("not the ID of a server")
	errAddress = errors.New("not an address of a server")
)

// maxID is that of a DNS label, with a dot and an instance.
const maxID = 63 + 1 + 16

// checkID takes NAME and NAME.INSTANCE, where NAME is an RFC 1123 label.
func checkID(id string) error {
	name, instance, dotted := strings.Cut(id, ".")
	label := func(s string) bool {
		return s != "" && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-' &&
			!strings.ContainsFunc(s, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' })
	}
	if len(id) > maxID || !label(name) || dotted && !label(instance) {
		return fmt.Errorf("%w: %q", errID, cutText(id))
	}
	return nil
}

// checkAddress takes host:port that can be dialled.
func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || !isHost(host) {
		return fmt.Errorf("%w: %q is no host:port", errAddress, cutText(address))
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%w: %q has no port from 1 to 65535", errAddress, cutText(address))
	}
	return nil
}

func isHost(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return !ip.IsUnspecified() && !ip.IsMulticast()
	}
	// RFC 1123, section 2.1, with underscores, which some networks have.
	return host != "" && len(host) <= 253 && host[0] != '.' &&
		!strings.ContainsFunc(host, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
		})
}

// cutText keeps what a stranger sends out of the log beyond some length.
func cutText(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}

// CheckJoin tells what is wrong with an entry of retry_join.
func CheckJoin(entry string) error {
	if strings.HasPrefix(entry, "_") {
		if !isHost(entry) {
			return fmt.Errorf("%w: %q is no DNS SRV name", errAddress, cutText(entry))
		}
		return nil
	}
	_, _, err := splitJoin(entry)
	return err
}

// splitJoin takes host, IP address, host:port or [IPv6]:port apart.
func splitJoin(entry string) (host, port string, err error) {
	port = strconv.Itoa(DefaultPort)
	host = strings.TrimSuffix(strings.TrimPrefix(entry, "["), "]")
	if _, ipErr := netip.ParseAddr(host); ipErr != nil {
		host = entry
		if h, p, splitErr := net.SplitHostPort(entry); splitErr == nil {
			host, port = h, p
		}
	}
	if err := checkAddress(net.JoinHostPort(host, port)); err != nil {
		return "", "", fmt.Errorf("%q is no host name, IP address, host:port or DNS SRV name: %w", cutText(entry), err)
	}
	return host, port, nil
}

const (
	lookupTimeout = 2 * time.Second
	// lookupEvery is how long names are kept: retries are more frequent.
	lookupEvery = 5 * time.Second
	// maxTargets bounds how many servers one is asked to find.
	maxTargets = 64
)

// finder turns retry_join into addresses. It is used by one goroutine.
type finder struct {
	join     []string
	resolver *net.Resolver

	at      time.Time
	targets []string
	problem []string
}

// find returns host:port of each server, and what could not be resolved.
func (f *finder) find(ctx context.Context, now time.Time) (targets, problems []string) {
	if !f.at.IsZero() && now.Sub(f.at) < lookupEvery {
		return f.targets, f.problem
	}
	f.at, f.targets, f.problem = now, nil, nil
	for _, entry := range f.join {
		found, err := f.resolve(ctx, entry)
		if err != nil {
			f.problem = append(f.problem, entry+": "+plainLookup(err))
		}
		for _, target := range found {
			if !slices.Contains(f.targets, target) && len(f.targets) < maxTargets {
				f.targets = append(f.targets, target)
			}
		}
	}
	return f.targets, f.problem
}

func (f *finder) resolve(ctx context.Context, entry string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	if !strings.HasPrefix(entry, "_") {
		host, port, err := splitJoin(entry)
		if err != nil {
			return nil, err
		}
		return f.addresses(ctx, host, port)
	}
	_, records, err := f.resolver.LookupSRV(ctx, "", "", entry)
	if err != nil && len(records) == 0 {
		return nil, err //nolint:wrapcheck // the caller tells the name
	}
	var targets []string
	var errs []error
	for _, r := range records {
		found, err := f.addresses(ctx, strings.TrimSuffix(r.Target, "."), strconv.Itoa(int(r.Port)))
		errs = append(errs, err)
		targets = append(targets, found...)
	}
	return targets, errors.Join(errs...)
}

func (f *finder) addresses(ctx context.Context, host, port string) ([]string, error) {
	if _, err := netip.ParseAddr(host); err == nil {
		return []string{net.JoinHostPort(host, port)}, nil
	}
	ips, err := f.resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err //nolint:wrapcheck // the caller tells the name
	}
	targets := make([]string, 0, len(ips))
	for _, ip := range ips {
		targets = append(targets, net.JoinHostPort(ip.Unmap().String(), port))
	}
	return targets, nil
}

// plainLookup leaves out the resolver's address, which changes between retries.
func plainLookup(err error) string {
	if lookup, ok := errors.AsType[*net.DNSError](err); ok {
		if lookup.IsTimeout {
			return "the name server does not answer"
		}
		if lookup.IsNotFound {
			return "no such name"
		}
		return lookup.Err
	}
	return err.Error()
}
