// Package plan makes the plan of a host's proxy from what is known: the
// definitions on this host, and the newest view of the catalog.
//
// Build is pure: equal inputs give equal plans, in a fixed order. It makes a
// plan of every input. What it can't understand or use, it leaves out, always
// to the side of denying, and says so; one bad record of another host must not
// freeze the policy of this one.
package plan

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
)

// MeshListener is the name of the listener for other proxies.
const MeshListener = "mesh"

// Inputs are all that a plan depends on.
type Inputs struct {
	TrustDomain string
	Bundle      ca.Bundle
	// Zone is the host's, empty if it has none.
	Zone string
	// MeshListen is where the mesh listener binds, host:port with an empty host
	// for every address.
	MeshListen string
	// AccessLog is where the proxy writes it, see proxy.Config.
	AccessLog string
	// Limits are the proxy's, see proxy.Config.
	Limits proxy.Limits
	// Definitions are valid and have no instance twice.
	Definitions []catalog.Definition
	View        *view.Snapshot
}

// Problem is something that was left out, and why.
type Problem struct {
	// Where is the name of the listener, cluster or policy.
	Where string `json:"where"`
	What  string `json:"what"`
	// Waiting says that it passes by itself, as soon as a server answers: a
	// definition is new.
	Waiting bool `json:"waiting,omitempty"`
}

// Topics returns what the definitions need to know, sorted.
func Topics(definitions []catalog.Definition) []view.Topic {
	topics := map[view.Topic]bool{view.Roots(): true, view.Node(): true}
	for _, d := range definitions {
		if len(d.WithDefaults().Ports) > 0 {
			topics[view.Intentions(d.Ref())] = true
		}
		for _, u := range d.Upstreams {
			topics[view.Upstream(d.Ref(), u.Ref())] = true
		}
	}
	return slices.SortedFunc(maps.Keys(topics), func(a, b view.Topic) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Source, b.Source))
	})
}

// Build returns the plan, and what was left out of it. Its lists are sorted by
// name.
func Build(in Inputs) (proxy.Config, []Problem) {
	b := &builder{
		in: in, listeners: map[string]proxy.Listener{}, inbounds: map[string]proxy.Inbound{},
		clusters: map[string]proxy.Cluster{}, policies: map[catalog.Name]proxy.Policy{},
		bound: map[string]string{},
	}
	definitions := slices.Clone(in.Definitions)
	for i := range definitions {
		definitions[i] = definitions[i].WithDefaults()
	}
	slices.SortFunc(definitions, func(a, b catalog.Definition) int {
		return cmp.Or(a.Ref().Compare(b.Ref()), cmp.Compare(a.ID, b.ID))
	})
	for _, d := range definitions {
		b.inbound(d)
	}
	for _, d := range definitions {
		for _, u := range d.Upstreams {
			b.upstream(d, u)
		}
	}
	if len(b.inbounds) > 0 {
		b.listeners[MeshListener] = proxy.Listener{Name: MeshListener, Kind: proxy.ListenMesh, Address: in.MeshListen}
	}
	config := proxy.Config{
		Position: in.View.Position(), Bundle: in.Bundle, TrustDomain: in.TrustDomain, Zone: in.Zone, AccessLog: in.AccessLog, Limits: in.Limits,
		Listeners: sorted(b.listeners), Inbounds: sorted(b.inbounds), Clusters: sorted(b.clusters),
	}
	for _, name := range slices.SortedFunc(maps.Keys(b.policies), catalog.Name.Compare) {
		config.Policies = append(config.Policies, b.policies[name])
	}
	return config, b.problems
}

func sorted[T any](m map[string]T) []T {
	if len(m) == 0 {
		return nil
	}
	all := make([]T, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		all = append(all, m[name])
	}
	return all
}

type builder struct {
	in        Inputs
	listeners map[string]proxy.Listener
	inbounds  map[string]proxy.Inbound
	clusters  map[string]proxy.Cluster
	policies  map[catalog.Name]proxy.Policy
	bound     map[string]string // address → listener
	problems  []Problem
}

func (b *builder) problem(where, format string, args ...any) {
	b.problems = append(b.problems, Problem{Where: where, What: fmt.Sprintf(format, args...)})
}

func (b *builder) waiting(where, format string, args ...any) {
	b.problem(where, format, args...)
	b.problems[len(b.problems)-1].Waiting = true
}

func (b *builder) identity(n catalog.Name) spiffe.ID {
	return spiffe.Service(b.in.TrustDomain, n.Namespace, n.Name)
}

// inbound adds the ports of one local instance and the policy of its service.
func (b *builder) inbound(d catalog.Definition) {
	ref := d.Ref()
	for _, p := range d.Ports {
		name := proxy.ServerName(p.Name, d.ID, ref.Name, ref.Namespace)
		b.inbounds[name] = proxy.Inbound{
			ServerName: name, Service: b.identity(ref), Instance: d.ID, Port: p.Name, Protocol: p.Protocol,
			Local: join(d.Host(), p.Port), Outside: outside(d, p.Port),
		}
	}
	if _, done := b.policies[ref]; len(d.Ports) > 0 && !done {
		b.policies[ref] = b.policy(ref)
	}
}

// outside is how a port of a destination outside the mesh is spoken to; nil for an
// application.
func outside(d catalog.Definition, port uint16) *proxy.Outside {
	if d.External == "" {
		return nil
	}
	o := &proxy.Outside{Authority: d.Authority(port)}
	if d.TLS != nil {
		o.TLS = &proxy.OutsideTLS{ServerName: cmp.Or(d.TLS.ServerName, d.External), CAFile: d.TLS.CAFile}
	}
	return o
}

// policy returns what may reach a local service. Without a word from a server,
// nothing may.
func (b *builder) policy(ref catalog.Name) proxy.Policy {
	where := "policy " + ref.String()
	p := proxy.Policy{Service: ref, Intentions: []intentions.Intention{}}
	topic := view.Intentions(ref)
	if !b.in.View.Has(topic) {
		b.waiting(where, "no server has told what may reach this service yet: everything is denied")
		return p
	}
	for key, data := range b.in.View.Items(topic) {
		one, err := b.intention(ref, data)
		if err != nil {
			deny, ok := denyInstead(data)
			if !ok || compiles(b.in.TrustDomain, ref, deny) != nil {
				b.problem(where, "intention %s can't be read, nor whom it is about: everything is denied: %v", key, err)
				return proxy.Policy{Service: ref, Intentions: []intentions.Intention{}}
			}
			b.problem(where, "intention %s can't be read and denies its source instead; is this agent older than the servers? %v", key, err)
			one = deny
		}
		p.Intentions = append(p.Intentions, one)
	}
	if err := compiles(b.in.TrustDomain, ref, p.Intentions...); err != nil {
		b.problem(where, "the intentions don't fit together: everything is denied: %v", err)
		p.Intentions = []intentions.Intention{}
	}
	return p
}

// intention reads one as strictly as it will be enforced: a member that this
// build does not know could be the one that denies.
func (b *builder) intention(ref catalog.Name, data []byte) (intentions.Intention, error) {
	var one intentions.Intention
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&one); err != nil {
		return one, err
	}
	return one, compiles(b.in.TrustDomain, ref, one)
}

func compiles(trustDomain string, ref catalog.Name, all ...intentions.Intention) error {
	_, err := intentions.Compile(trustDomain, ref, all)
	return err
}

// denyInstead returns the intention that denies what an unreadable one was
// about, so that a less specific one can't allow it.
func denyInstead(data []byte) (intentions.Intention, bool) {
	var about struct {
		Source      string `json:"source"`
		Destination string `json:"destination"`
	}
	if err := json.Unmarshal(data, &about); err != nil || about.Source == "" || about.Destination == "" {
		return intentions.Intention{}, false
	}
	return intentions.Intention{Source: about.Source, Destination: about.Destination, Action: intentions.Deny}, true
}

// upstream adds one listener of a local service and the cluster behind it.
func (b *builder) upstream(d catalog.Definition, u catalog.Upstream) {
	source, destination := d.Ref(), u.Ref()
	address := join(u.LocalAddress, u.LocalPort)
	at := address
	if u.LocalAddress == catalog.DefaultAddress {
		at = strconv.Itoa(int(u.LocalPort))
	}
	if u.LocalSocket != "" {
		address = proxy.UnixAddress(u.LocalSocket)
		at = address
	}
	listener := proxy.Listener{
		Name: "upstream/" + source.String() + "/" + destination.String() + "/" + at, Kind: proxy.ListenUpstream,
		Address: address, SocketMode: u.LocalSocketMode, Source: b.identity(source),
	}
	if other, taken := b.bound[address]; taken {
		// Two instances of one service may share a listener: there is nothing
		// by which to tell them apart.
		same := b.listeners[other].Name == listener.Name && b.listeners[other].Cluster == b.cluster(source, destination, u)
		if !same {
			b.problem(listener.Name, "%s is taken by %s: choose another local_port or local_socket for %s in the definition of %s/%s",
				address, other, destination.Short(), source.Short(), d.ID)
		}
		return
	}
	b.bound[address] = listener.Name
	listener.Cluster = b.cluster(source, destination, u)
	b.listeners[listener.Name] = listener
}

// cluster adds one port of a destination as a source sees it, and returns its
// name.
func (b *builder) cluster(source, destination catalog.Name, u catalog.Upstream) string {
	topic := view.Upstream(source, destination)
	service, known := b.service(topic)
	port := u.Port
	if p, ok := service.Port(port); ok {
		port = p.Name
	} else if port == "" {
		port = catalog.DefaultPort
	}
	name := source.String() + ">" + destination.String() + ":" + port
	if c, done := b.clusters[name]; done {
		c.Limits = c.Limits.Lower(u.Limits)
		b.clusters[name] = c
		return name
	}
	c := proxy.Cluster{Name: name, Service: b.identity(destination), Port: port, Protocol: catalog.ProtocolAuto, Limits: u.Limits}
	p, ok := service.Port(port)
	if ok {
		c.Protocol, c.Upgrade = p.Protocol, p.Upgrade
	}
	denied, isDenied := b.in.View.Get(topic, "denied")
	switch {
	case isDenied:
		c.Denied = reason(denied)
	case !b.in.View.Has(topic):
		b.waiting(name, "no server has told about %s yet", destination)
	case !known:
		b.problem(name, "there is no service %s: nobody has registered it", destination)
	case !ok:
		b.problem(name, "service %s has no port %q; it has %s", destination, port, portNames(service))
	default:
		c.Endpoints, c.ZoneWeight = b.endpoints(name, topic, port)
	}
	b.clusters[name] = c
	return name
}

// service returns the central spec of a topic's destination.
func (b *builder) service(topic view.Topic) (catalog.Service, bool) {
	data, ok := b.in.View.Get(topic, "service")
	if !ok {
		return catalog.Service{}, false
	}
	var s catalog.Service
	if err := json.Unmarshal(data, &s); err != nil || s.Validate() != nil {
		return catalog.Service{}, false
	}
	return s, true
}

// reason returns why a source may not send at all; it is never empty.
func reason(data []byte) string {
	var d struct {
		Reason string `json:"reason"`
	}
	if err := json.Unmarshal(data, &d); err != nil || d.Reason == "" {
		return "the servers deny it"
	}
	return d.Reason
}

func portNames(s catalog.Service) string {
	if len(s.Ports) == 0 {
		return "none: it is a pure client"
	}
	names := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		names[i] = p.Name
	}
	return strings.Join(names, ", ")
}

// endpoints returns the instances that may be used: healthy ones in tier 0,
// those whose node's lease is lost in tier 1, used while nothing better
// exists. Critical and draining ones and those of which no status is known are
// left out: they asked for no work, or no longer can do it. They count in
// zoneWeight, which is that of all instances in this host's zone.
func (b *builder) endpoints(cluster string, topic view.Topic, port string) (out []proxy.Endpoint, zoneWeight int) {
	var all []catalog.Endpoint
	for key, data := range b.in.View.Items(topic) {
		id, ok := strings.CutPrefix(key, "instance/")
		if !ok {
			continue
		}
		var e catalog.Endpoint
		if err := json.Unmarshal(data, &e.Instance); err != nil {
			b.problem(cluster, "instance %s can't be read and is not used: %v", id, err)
			continue
		}
		if err := e.Instance.Validate(); err != nil {
			b.problem(cluster, "instance %s is not used: %v", id, err)
			continue
		}
		e.Status.Health = catalog.HealthUnknown
		if status, ok := b.in.View.Get(topic, "status/"+id); ok {
			if err := json.Unmarshal(status, &e.Status); err != nil {
				e.Status = catalog.InstanceStatus{}
				b.problem(cluster, "the status of instance %s can't be read, it is not used: %v", id, err)
			}
		}
		e.Stale = b.lost(topic, e.Instance.Node)
		all = append(all, e)
	}
	for _, e := range all {
		if _, ok := endpoint(e, port); ok && b.in.Zone != "" && e.Instance.Zone == b.in.Zone {
			zoneWeight += max(e.Instance.Weight, 1)
		}
	}
	use, spare := catalog.SelectEndpoints(all)
	for _, e := range slices.Concat(use, spare) {
		if ep, ok := endpoint(e, port); ok {
			out = append(out, ep)
		}
	}
	slices.SortFunc(out, func(a, b proxy.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Tier, b.Tier), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Instance, b.Instance))
	})
	return out, zoneWeight
}

// lost reports whether a node's lease ran out. A node without a lease record is
// taken as connected: the record is written when it connects.
func (b *builder) lost(topic view.Topic, node string) bool {
	var l catalog.Lease
	data, ok := b.in.View.Get(topic, "lease/"+node)
	return ok && json.Unmarshal(data, &l) == nil && l.Lost
}

// endpoint returns one port of an instance. An instance that was registered
// before its service got the port has none of that name.
func endpoint(e catalog.Endpoint, port string) (proxy.Endpoint, bool) {
	i := e.Instance
	at := slices.IndexFunc(i.Ports, func(p catalog.InstancePort) bool { return p.Name == port })
	if at < 0 {
		return proxy.Endpoint{}, false
	}
	out := proxy.Endpoint{
		Instance: i.ID, Node: i.Node, Address: i.MeshAddress, ServerName: i.Ports[at].ServerName, Zone: i.Zone, Weight: i.Weight,
	}
	if _, err := proxy.ParseServerName(out.ServerName); err != nil {
		out.ServerName = proxy.ServerName(port, i.ID, i.Service, i.Ref().Namespace)
	}
	if e.Tier() == catalog.TierStale {
		out.Tier = 1
	}
	return out, true
}

func join(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
