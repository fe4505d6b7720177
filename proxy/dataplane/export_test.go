package dataplane

import (
	"context"
	"net/netip"
	"time"
)

// AppendMember is for tests that hold it against encoding/json.
func AppendMember(b []byte, name string, value []byte) []byte { return appendMember(b, name, value) }

// SetLookup sets what finds the addresses of hosts outside the mesh.
func SetLookup(p *Plane, lookup func(context.Context, string) ([]netip.Addr, error)) {
	p.names.mu.Lock()
	defer p.names.mu.Unlock()
	p.names.lookup = lookup
}

// AgeNames makes all that is known of hosts outside the mesh older than it may be without being asked for again.
func AgeNames(p *Plane) {
	p.names.mu.Lock()
	defer p.names.mu.Unlock()
	for _, one := range p.names.known {
		one.answered = one.answered.Add(-2 * nameFresh)
		one.tried = one.tried.Add(-2 * nameFresh)
	}
}

// ParseTimeout, AppendTimeout and ParseStatus are for tests of what gRPC's fields may hold.
func ParseTimeout(b []byte) (time.Duration, bool) { return parseTimeout(b) }

// AppendTimeout writes what ParseTimeout reads.
func AppendTimeout(b []byte, d time.Duration) []byte { return appendTimeout(b, d) }

// ParseStatus reads a status.
func ParseStatus(b []byte) int { return parseStatus(b) }
