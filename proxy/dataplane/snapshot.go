package dataplane

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/balance"
	"github.com/meshd/meshd/proxy/l7"
)

// The application protocols between proxies (ALPN): the far side detects nothing.
const (
	alpnTCP   = "mesh-tcp"
	alpnHTTP1 = "http/1.1"
	alpnHTTP2 = "h2"
)

// snapshot is a plan made ready to run. It is immutable; what it points to and that changes (pools, states) is shared with the
// snapshots before and after it.
type snapshot struct {
	config    proxy.Config
	limits    Limits  // those of the plan, else the process's own
	egress    servers // of new connections
	ingress   servers
	leaves    map[spiffe.ID]*ca.Leaf
	inbounds  map[string]*inboundRoute  // by server name
	upstreams map[string]*upstreamRoute // by listener
	denied    map[string]string         // by cluster: why, for the clusters that are denied
	policies  map[catalog.Name]policy   // of local services
	endpoints map[endpointKey]*endpoint // in use by upstreams
	apps      map[appKey]*localApp
	states    balance.Registry       // of endpoints
	budgets   map[balance.Key]budget // of clusters; their keys name no instance
	learnt    map[learntKey]*learnt  // of ports of destinations
}

type policy struct {
	spec     proxy.Policy
	compiled *intentions.Policy // nil denies
}

// inboundRoute is one port of one local instance.
type inboundRoute struct {
	proxy.Inbound
	destination catalog.Name
	policy      *intentions.Policy
	app         *localApp
	outside     *outside // nil: it is an application of this host
	leaf        *ca.Leaf // nil if there is none
}

// appKey tells apart what inbounds stand for.
type appKey struct {
	local, authority, serverName, caFile string
	protocol                             catalog.Protocol
	outside, secure                      bool
	limits                               proxy.Limits
}

// localApp is what an inbound stands for, with the connections to it.
type localApp struct {
	pools
	outside *outside
}

func keyOfApp(in proxy.Inbound, limits proxy.Limits) appKey {
	key := appKey{local: in.Local, protocol: in.Protocol.OrAuto(), limits: limits}
	if o := in.Outside; o != nil {
		key.outside, key.authority = true, o.Authority
		if o.TLS != nil {
			key.secure, key.serverName, key.caFile = true, o.TLS.ServerName, o.TLS.CAFile
		}
	}
	return key
}

// http tells what version of HTTP connections with the ALPN are, 0 for none, and whether the port takes the ALPN at all. A caller
// must not get around the rules and headers of an HTTP port by calling it TCP. Callers of an older version do call HTTP/2 so: it
// is taken for what it is.
func (in *inboundRoute) http(alpn string) (v version, ok bool) {
	switch in.Protocol.OrAuto() {
	case catalog.ProtocolHTTP:
		return webOf(alpn), alpn != alpnTCP && webOf(alpn) != 0
	case catalog.ProtocolHTTP2, catalog.ProtocolGRPC:
		return two, alpn == alpnHTTP2 || alpn == alpnTCP
	case catalog.ProtocolAuto:
		return webOf(alpn), webOf(alpn) != 0 || alpn == alpnTCP
	default:
		return 0, alpn == alpnTCP
	}
}

func webOf(alpn string) version {
	switch alpn {
	case alpnHTTP1:
		return one
	case alpnHTTP2:
		return two
	default:
		return 0
	}
}

// pool returns the connections to the application for what came by a version, and whether they are HTTP/1: an application is spoken
// to as it is declared, or else as its caller speaks.
func (in *inboundRoute) pool(v version) (up l7.Upstream, blocks bool) {
	switch in.Protocol.OrAuto() {
	case catalog.ProtocolHTTP:
		v = one
	case catalog.ProtocolHTTP2, catalog.ProtocolGRPC:
		v = two
	default:
	}
	if v == two {
		return in.app.two, false
	}
	return in.app.one, true
}

// upstreamRoute is where the connections of one upstream listener go.
type upstreamRoute struct {
	source      spiffe.ID
	cluster     proxy.Cluster
	destination catalog.Name
	http        bool // it is declared to be HTTP, of any version
	auto        bool // nothing is declared
	learnt      *learnt
	picker      balance.Picker
	budget      budget
	endpoints   []*endpoint
	states      []*balance.State
}

// endpointKey names all that a connection to an endpoint depends on. Where none of it changes with a plan, connections stay.
type endpointKey struct {
	balance.Key
	address, serverName string
	protocol            catalog.Protocol
	upgrade             bool
	service, source     spiffe.ID
	limits              proxy.Limits
	serial              string  // of our certificate: a renewed one gets connections of its own
	roots               ca.Hash // of the peer's trust domain
}

// endpoint is one instance of a destination, seen by one local service.
type endpoint struct {
	instance, address string
	key               endpointKey
	port              string
	state             *balance.State
	pools
	old  atomic.Bool // of upgrade: its proxy is too old for HTTP/2
	made time.Time
	// expires is the earliest end of a peer's certificate in the pool, in unix seconds; 0 while there was none.
	expires atomic.Int64
}

// newSnapshot returns one without anything but limits and servers. They are those of before, if there is one and it has the same limits.
func (p *Plane) newSnapshot(cfg proxy.Config, before *snapshot) *snapshot {
	s := &snapshot{
		config:    cfg,
		leaves:    map[spiffe.ID]*ca.Leaf{},
		inbounds:  make(map[string]*inboundRoute, len(cfg.Inbounds)),
		upstreams: make(map[string]*upstreamRoute, len(cfg.Listeners)),
		denied:    map[string]string{},
		policies:  make(map[catalog.Name]policy, len(cfg.Policies)),
		endpoints: map[endpointKey]*endpoint{},
		apps:      map[appKey]*localApp{},
		learnt:    map[learntKey]*learnt{},
	}
	if before != nil && before.config.Limits == cfg.Limits {
		s.limits, s.egress, s.ingress = before.limits, before.egress, before.ingress
		return s
	}
	s.limits = p.limits.with(cfg.Limits)
	s.egress = p.newServers(s.limits, outbound, func(v version) l7.Handler { return egress{p, v} })
	s.ingress = p.newServers(s.limits, inbound, func(v version) l7.Handler { return ingress{p, v} })
	return s
}

// compile makes a plan ready, with everything from the snapshot before that it leaves alone.
func (p *Plane) compile(cfg proxy.Config, leaves []*ca.Leaf, before *snapshot) (*snapshot, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("plan %s: %w", cfg.Position, err)
	}
	s := p.newSnapshot(cfg, before)
	for _, leaf := range leaves {
		s.leaves[leaf.ID()] = leaf
	}
	for _, spec := range cfg.Policies {
		compiled := before.policies[spec.Service].compiled
		if before.config.TrustDomain != cfg.TrustDomain || !reflect.DeepEqual(before.policies[spec.Service].spec, spec) {
			var err error
			if compiled, err = spec.Compile(cfg.TrustDomain); err != nil {
				return nil, fmt.Errorf("plan %s: %w", cfg.Position, err)
			}
		}
		s.policies[spec.Service] = policy{spec: spec, compiled: compiled}
	}
	for _, in := range cfg.Inbounds {
		s.inbounds[in.ServerName] = p.compileInbound(s, before, in)
	}
	if err := p.compileUpstreams(s, before); err != nil {
		return nil, fmt.Errorf("plan %s: %w", cfg.Position, err)
	}
	return s, nil
}

func (p *Plane) compileInbound(s, before *snapshot, in proxy.Inbound) *inboundRoute {
	name := catalog.Name{Namespace: in.Service.Namespace, Name: in.Service.Name}
	key := keyOfApp(in, s.config.Limits)
	app := s.apps[key]
	if app == nil {
		app = before.apps[key]
	}
	if app == nil {
		address, limit := in.Local, p.limits.ConnectTimeout
		if _, _, named := hostName(address); named || key.secure {
			limit = max(limit, nameConnect)
		}
		o := newOutside(in)
		app = &localApp{outside: o, pools: p.newPools(s.limits, in.Protocol, false, limit, func(ctx context.Context, v version) (net.Conn, error) {
			return p.dialApp(ctx, address, o, v)
		})}
	}
	s.apps[key] = app
	return &inboundRoute{
		Inbound: in, destination: name, policy: s.policies[name].compiled, app: app, outside: app.outside, leaf: s.leaves[in.Service],
	}
}

func (p *Plane) compileUpstreams(s, before *snapshot) error {
	clusters := make(map[string]proxy.Cluster, len(s.config.Clusters))
	var keys []balance.Key
	for _, cl := range s.config.Clusters {
		clusters[cl.Name] = cl
		if cl.Denied != "" {
			s.denied[cl.Name] = cl.Denied
		}
		for _, ep := range cl.Endpoints {
			keys = append(keys, s.stateKey(cl, ep))
		}
	}
	s.states = before.states.Next(keys, time.Now())
	s.budgetsFor(before)
	for _, l := range s.config.Listeners {
		if l.Kind != proxy.ListenUpstream {
			continue
		}
		route, err := p.compileUpstream(s, before, l, clusters[l.Cluster])
		if err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
		s.upstreams[l.Name] = route
	}
	return nil
}

func (s *snapshot) stateKey(cl proxy.Cluster, ep proxy.Endpoint) balance.Key {
	return balance.Key{Generation: s.config.Position.Generation, Cluster: cl.Name, Node: ep.Node, Instance: ep.Instance}
}

func (p *Plane) compileUpstream(s, before *snapshot, l proxy.Listener, cl proxy.Cluster) (*upstreamRoute, error) {
	route := &upstreamRoute{
		source: l.Source, cluster: cl,
		destination: catalog.Name{Namespace: cl.Service.Namespace, Name: cl.Service.Name},
		http:        cl.Protocol.HTTP(),
		auto:        cl.Protocol.OrAuto() == catalog.ProtocolAuto,
		budget:      s.budgets[balance.Key{Generation: s.config.Position.Generation, Cluster: cl.Name}],
	}
	if route.auto {
		route.learnt = s.learntOf(before, learntKey{cl.Service, cl.Port})
	}
	serial := ""
	if leaf := s.leaves[l.Source]; leaf != nil {
		serial = leaf.Chain()[0].SerialNumber.String()
	}
	candidates := make([]balance.Candidate, 0, len(cl.Endpoints))
	for _, ep := range cl.Endpoints {
		key := endpointKey{
			Key: s.stateKey(cl, ep), address: ep.Address, serverName: ep.ServerName, protocol: cl.Protocol.OrAuto(), upgrade: cl.Upgrade,
			service: cl.Service, source: l.Source, serial: serial, roots: s.config.Bundle.Hash(cl.Service.TrustDomain), limits: s.config.Limits,
		}
		e := s.endpoints[key]
		if e == nil {
			e = before.endpoints[key]
		}
		if e == nil || e.stale(time.Now()) {
			e = p.newEndpoint(s.limits, key, ep.Instance, cl.Port, s.states.State(key.Key))
		}
		s.endpoints[key] = e
		state := e.state // that of the registry, which keeps it as long as the endpoint is kept
		route.endpoints, route.states = append(route.endpoints, e), append(route.states, state)
		candidates = append(candidates, balance.Candidate{
			State: state, Tier: ep.Tier, Weight: ep.Weight, Far: s.config.Zone != "" && ep.Zone != s.config.Zone,
		})
	}
	var err error
	route.picker, err = balance.New("", candidates, cl.ZoneWeight)
	return route, err
}

func (p *Plane) newEndpoint(limits Limits, key endpointKey, instance, port string, state *balance.State) *endpoint {
	e := &endpoint{instance: instance, address: key.address, key: key, port: port, state: state, made: time.Now()}
	e.pools = p.newPools(limits, key.protocol, key.upgrade, p.limits.ConnectTimeout+p.limits.HandshakeTimeout,
		func(ctx context.Context, v version) (net.Conn, error) { return p.dialHTTP(ctx, e, v) })
	return e
}

// learntOf returns what is known of a port. It is forgotten with the plan that has the port no more.
func (s *snapshot) learntOf(before *snapshot, key learntKey) *learnt {
	k := s.learnt[key]
	if k == nil {
		k = before.learnt[key]
	}
	if k == nil {
		k = &learnt{}
	}
	s.learnt[key] = k
	return k
}

// certificate returns the newest leaf of a local service for a handshake.
func (s *snapshot) certificate(id spiffe.ID) (*tls.Certificate, error) {
	leaf := s.leaves[id]
	if leaf == nil {
		return nil, fmt.Errorf("%w: of %s", ca.ErrNoLeaf, id)
	}
	return leaf.TLS(), nil
}

// stale reports whether a pool should be replaced although the plan is the same.
func (s *snapshot) stale(now time.Time) bool {
	for _, e := range s.endpoints {
		if e.stale(now) {
			return true
		}
	}
	return false
}

// retire closes the idle connections of pools that the next snapshot does not have. Requests that run on them end in peace.
func (s *snapshot) retire(next *snapshot) {
	for key, e := range s.endpoints {
		if next.endpoints[key] != e {
			e.retire()
		}
	}
	for key, app := range s.apps {
		if next.apps[key] != app {
			app.retire()
		}
	}
}
