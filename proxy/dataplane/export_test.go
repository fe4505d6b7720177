package dataplane

import (
	"context"
	"net/netip"
	"time"

	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/http2"
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

// HTTP2Limits are the labels of mesh_http2_refusals_total with what they count.
func HTTP2Limits(c *http2.Counters) map[string]func() uint64 { return http2Limits(c) }

// LimitsOf returns the limits that a plan makes of the defaults, and those of HTTP/2 for other proxies and for upstreams.
func LimitsOf(plan proxy.Limits) (own Limits, mesh, upstream http2.Limits) {
	own = Limits{}.withDefaults().with(plan)
	return own, own.mesh(), own.upstream()
}
