package proxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// maxTier is the highest Endpoint.Tier. There are two (healthy, stale); the room above is for finer orders of use.
const maxTier = 15

// Validate tells why a proxy must not run the plan, or returns nil. A plan is taken or refused whole: part of one could let in
// what the rest denies. The error joins *catalog.FieldError values, whose paths are those of the plan's JSON.
func (c Config) Validate() error {
	v := validator{c: c}
	if v.empty() {
		return nil
	}
	if _, err := spiffe.ParseTrustDomain(c.TrustDomain); err != nil {
		v.Add("trust_domain", "%v", err)
	}
	if len(c.Bundle.Roots(c.TrustDomain)) == 0 {
		v.Add("bundle", "has no roots of the proxy's own trust domain %q", c.TrustDomain)
	}
	v.Under("limits", c.Limits.Validate())
	v.clusters()
	v.listeners()
	v.inbounds()
	v.policies()
	return v.Err()
}

// validator collects the problems of one plan.
type validator struct {
	catalog.Problems
	c            Config
	clusterNames map[string]bool
}

func (v *validator) empty() bool {
	return len(v.c.Listeners)+len(v.c.Inbounds)+len(v.c.Clusters)+len(v.c.Policies) == 0 && v.c.TrustDomain == ""
}

func (v *validator) listeners() {
	names, addresses := map[string]bool{}, map[string]string{}
	for i, l := range v.c.Listeners {
		at := index("listeners", i)
		v.unique(at+".name", l.Name, names)
		v.listenAddress(at+".address", l, addresses)
		switch l.Kind {
		case ListenMesh:
			if !l.Source.IsZero() || l.Cluster != "" {
				v.Add(at, "a mesh listener has neither source nor cluster")
			}
		case ListenUpstream:
			v.service(at+".source", l.Source, v.c.TrustDomain)
			if !v.clusterNames[l.Cluster] {
				v.Add(at+".cluster", "%q is no cluster of this plan", l.Cluster)
			}
		default:
			v.Add(at+".kind", "%q is no kind of listener that this proxy knows", l.Kind)
		}
	}
}

func (v *validator) listenAddress(at string, l Listener, addresses map[string]string) {
	if path, ok := l.UnixPath(); ok {
		v.Under(at, catalog.CheckSocketPath(path))
		if l.Kind != ListenUpstream {
			v.Add(at, "%q: only an upstream listens on a unix socket", l.Address)
		}
		if _, err := catalog.ParseSocketMode(l.SocketMode); err != nil {
			v.Add(at, "socket_mode %q is no mode", l.SocketMode)
		}
		if other := addresses[l.Address]; other != "" {
			v.Add(at, "%q is listener %q's address too", l.Address, other)
		}
		addresses[l.Address] = l.Name
		return
	}
	ip, port, err := splitAddress(l.Address)
	switch {
	case err != nil:
		v.Add(at, "%v", err)
	case ip != "" && !isIP(ip):
		v.Add(at, "%q: the host must be an IP address or empty", l.Address)
	case port == 0: // the kernel chooses: for tests
	case addresses[l.Address] != "":
		v.Add(at, "%q is listener %q's address too", l.Address, addresses[l.Address])
	default:
		addresses[l.Address] = l.Name
	}
}

func (v *validator) inbounds() {
	names := map[string]bool{}
	for i, in := range v.c.Inbounds {
		at := index("inbounds", i)
		v.unique(at+".server_name", in.ServerName, names)
		v.service(at+".service", in.Service, v.c.TrustDomain)
		if want := ServerName(in.Port, in.Instance, in.Service.Name, in.Service.Namespace); in.ServerName != want {
			v.Add(at+".server_name", "is %q, that of this service, instance and port is %q", in.ServerName, want)
		}
		v.protocol(at+".protocol", in.Protocol)
		v.dialAddress(at+".local", in.Local)
		if o := in.Outside; o != nil && o.Authority == "" {
			v.Add(at+".outside.authority", "is missing")
		} else if o != nil && o.TLS != nil && o.TLS.ServerName == "" {
			v.Add(at+".outside.tls.server_name", "is missing")
		}
	}
}

func (v *validator) clusters() {
	v.clusterNames = make(map[string]bool, len(v.c.Clusters))
	for i, cl := range v.c.Clusters {
		at := index("clusters", i)
		v.unique(at+".name", cl.Name, v.clusterNames)
		v.service(at+".service", cl.Service, "")
		v.protocol(at+".protocol", cl.Protocol)
		if cl.Denied != "" && len(cl.Endpoints) > 0 {
			v.Add(at+".endpoints", "a denied cluster has none")
		}
		v.Under(at+".limits", cl.Limits.Validate())
		if cl.ZoneWeight < 0 {
			v.Add(at+".zone_weight", "%d is negative", cl.ZoneWeight)
		}
		seen := map[[2]string]bool{}
		for j, ep := range cl.Endpoints {
			at := index(at+".endpoints", j)
			if ep.Instance == "" {
				v.Add(at+".instance", "is empty")
			}
			if key := [2]string{ep.Node, ep.Instance}; seen[key] {
				v.Add(at, "instance %q on node %q is listed twice", ep.Instance, ep.Node)
			} else {
				seen[key] = true
			}
			v.dialAddress(at+".address", ep.Address)
			if _, err := ParseServerName(ep.ServerName); err != nil {
				v.Add(at+".server_name", "%v", err)
			}
			if ep.Tier < 0 || ep.Tier > maxTier {
				v.Add(at+".tier", "%d is outside of 0 to %d", ep.Tier, maxTier)
			}
			if ep.Weight < 0 || ep.Weight > catalog.MaxWeight {
				v.Add(at+".weight", "%d is outside of 0 to %d", ep.Weight, catalog.MaxWeight)
			}
		}
	}
}

func (v *validator) policies() {
	names := map[string]bool{}
	for i, p := range v.c.Policies {
		at := index("policies", i)
		v.unique(at+".service", p.Service.String(), names)
		if _, err := p.Compile(v.c.TrustDomain); err != nil {
			v.Under(at+".intentions", err)
		}
	}
}

func (v *validator) unique(at, name string, seen map[string]bool) {
	if name == "" {
		v.Add(at, "is empty")
	}
	if seen[name] {
		v.Add(at, "%q is there twice", name)
	}
	seen[name] = true
}

// service checks the identity of a service; an empty trust domain means any.
func (v *validator) service(at string, id spiffe.ID, trustDomain string) {
	switch err := id.Valid(); {
	case err != nil:
		v.Add(at, "%v", err)
	case id.Kind != spiffe.KindService:
		v.Add(at, "%s is a %s, want a service", id, id.Kind)
	case trustDomain != "" && id.TrustDomain != trustDomain:
		v.Add(at, "%s is outside of the proxy's trust domain %q", id, trustDomain)
	}
}

func (v *validator) protocol(at string, p catalog.Protocol) {
	if p != "" && !slices.Contains(catalog.Protocols(), p) {
		v.Add(at, "%q is no protocol that this proxy knows", p)
	}
}

func (v *validator) dialAddress(at, address string) {
	host, port, err := splitAddress(address)
	switch {
	case err != nil:
		v.Add(at, "%v", err)
	case host == "" || strings.ContainsAny(host, "/ "):
		v.Add(at, "%q has no host", address)
	case port == 0:
		v.Add(at, "%q has no port", address)
	}
}

func index(list string, i int) string { return list + "[" + strconv.Itoa(i) + "]" }

// splitAddress cuts host:port, with brackets around an IPv6 host.
func splitAddress(address string) (host string, port uint16, err error) {
	i := strings.LastIndexByte(address, ':')
	if i < 0 {
		return "", 0, fmt.Errorf("%q is not host:port", address)
	}
	n, err := strconv.ParseUint(address[i+1:], 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: the port is not a number up to 65535", address)
	}
	host = address[:i]
	if inner, ok := strings.CutPrefix(host, "["); ok {
		host, ok = strings.CutSuffix(inner, "]")
		if !ok || !strings.Contains(host, ":") || !isIP(host) {
			return "", 0, fmt.Errorf("%q: there is no IPv6 address in the brackets", address)
		}
	} else if strings.ContainsAny(host, ":[]") {
		return "", 0, fmt.Errorf("%q: an IPv6 address needs brackets", address)
	}
	return host, uint16(n), nil
}

func isIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
