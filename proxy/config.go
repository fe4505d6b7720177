// Package proxy holds the plan of one proxy: what it listens on, where it may
// send, whom it lets in. A Config is immutable and says nothing about run-time
// state; pools, latencies, ejections and counters live in proxy/dataplane,
// keyed by what the plan names. Private keys never are part of it.
package proxy

import (
	"strings"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// Config is the whole plan of one proxy. The zero Config listens nowhere and
// lets nothing in.
type Config struct {
	// Position is that of the newest input in the plan.
	Position catalog.Position `json:"position"`
	// Bundle holds the roots of every trust domain that may take part.
	Bundle ca.Bundle `json:"bundle"`
	// TrustDomain is the proxy's own.
	TrustDomain string `json:"trust_domain"`
	// Zone is where the proxy is, empty if that is not known. Endpoints of the
	// same zone are preferred.
	Zone      string     `json:"zone,omitempty"`
	Listeners []Listener `json:"listeners,omitempty"`
	Inbounds  []Inbound  `json:"inbounds,omitempty"`
	Clusters  []Cluster  `json:"clusters,omitempty"`
	Policies  []Policy   `json:"policies,omitempty"`
	// AccessLog is where one line of JSON goes per request and TCP connection:
	// a file's absolute path, or AccessLogStdout. Empty writes none. A proxy
	// that can't write there serves all the same.
	AccessLog string `json:"access_log,omitempty"`
	// Limits bound what others can make the proxy hold and do. A proxy that does
	// not know them has its defaults.
	Limits Limits `json:"limits,omitzero"`
}

// AccessLogStdout as Config.AccessLog is the proxy's standard output.
const AccessLogStdout = "stdout"

// A ListenerKind tells what a listening socket is for.
type ListenerKind string

const (
	// ListenMesh accepts mutual TLS from other proxies.
	ListenMesh ListenerKind = "mesh"
	// ListenUpstream accepts plain connections of one local service for one
	// destination.
	ListenUpstream ListenerKind = "upstream"
)

// Listener is one listening socket. Whoever feeds the proxy opens it and
// passes it by name; a proxy that runs alone opens it itself.
type Listener struct {
	// Name is unique in the plan and stays the same over restarts:
	// "mesh" or "upstream/SOURCE/DESTINATION/PORT".
	Name string       `json:"name"`
	Kind ListenerKind `json:"kind"`
	// Address is host:port with a numeric host, or an empty one for every
	// address of the host; or "unix:" and the path of a unix socket, for an
	// upstream listener. A passed socket is used only if it is bound there.
	Address string `json:"address"`
	// SocketMode is the mode of a unix socket, see catalog.ParseSocketMode.
	SocketMode string `json:"socket_mode,omitempty"`
	// Source is the service that owns an upstream listener: every connection
	// accepted there is sent with its identity.
	Source spiffe.ID `json:"source,omitzero"`
	// Cluster names where an upstream listener's bytes go.
	Cluster string `json:"cluster,omitempty"`
}

// UnixAddress returns the Address of a listener on a unix socket.
func UnixAddress(path string) string { return unixPrefix + path }

const unixPrefix = "unix:"

// UnixPath returns the path of a listener's unix socket, and false if it
// listens on TCP.
func (l Listener) UnixPath() (path string, ok bool) { return strings.CutPrefix(l.Address, unixPrefix) }

// Inbound is one port of one local instance, as the mesh reaches it.
type Inbound struct {
	// ServerName is the SNI that picks it, see ServerName.
	ServerName string `json:"server_name"`
	// Service is the identity that is presented.
	Service  spiffe.ID        `json:"service"`
	Instance string           `json:"instance"`
	Port     string           `json:"port"`
	Protocol catalog.Protocol `json:"protocol"`
	// Local is the application's own host:port.
	Local string `json:"local"`
	// Outside says how to speak to what is there, where that is no application of
	// this host but a destination outside the mesh.
	Outside *Outside `json:"outside,omitempty"`
}

// Outside is how a destination outside the mesh is spoken to.
type Outside struct {
	// Authority replaces the one of HTTP requests.
	Authority string `json:"authority"`
	// TLS, if not nil, protects the connection.
	TLS *OutsideTLS `json:"tls,omitempty"`
}

// OutsideTLS is TLS with somebody who is not of the mesh.
type OutsideTLS struct {
	// ServerName is asked for, and the certificate must be for it.
	ServerName string `json:"server_name"`
	// CAFile holds the roots that the certificate must chain to, as PEM; empty:
	// those of the host.
	CAFile string `json:"ca_file,omitempty"`
}

// Cluster is one port of one destination service, seen from here.
type Cluster struct {
	// Name is "NAMESPACE/SERVICE:PORT" of the destination, with the source
	// before it where access differs: "NS/SOURCE>NS/SERVICE:PORT".
	Name string `json:"name"`
	// Service is the identity that an endpoint must prove.
	Service  spiffe.ID        `json:"service"`
	Port     string           `json:"port"`
	Protocol catalog.Protocol `json:"protocol"`
	// Upgrade has HTTP/1 carried over HTTP/2 between the proxies. A proxy that
	// does not know it sends HTTP/1.
	Upgrade bool `json:"upgrade,omitempty"`
	// Denied, if not empty, says why the source may not send here at all.
	// Such a cluster has no endpoints, and its callers are told "denied".
	Denied string `json:"denied,omitempty"`
	// ZoneWeight is the weight of all instances in the proxy's zone, those that
	// can't be used included: what the zone has when all is well. 0 means that
	// of the endpoints that are listed.
	ZoneWeight int `json:"zone_weight,omitempty"`
	// Limits bound what this proxy sends there at a time; 0 is its default.
	Limits    catalog.Limits `json:"limits,omitzero"`
	Endpoints []Endpoint     `json:"endpoints,omitempty"`
}

// Endpoint is one instance's port, as other proxies reach it. Node and Instance
// together are unique in a cluster; run-time state is kept under them.
type Endpoint struct {
	Instance string `json:"instance"`
	Node     string `json:"node"`
	// Address is the mesh address host:port of the proxy before it.
	Address string `json:"address"`
	// ServerName is the SNI that picks the instance there.
	ServerName string `json:"server_name"`
	// Tier orders use: endpoints of a higher tier are used only while no lower
	// one is usable. 0 healthy, 1 stale (its node's lease is lost).
	Tier int `json:"tier,omitempty"`
	// Zone is where it is, empty if that is not known.
	Zone string `json:"zone,omitempty"`
	// Weight is its part of the traffic in proportion to others, 1 to
	// catalog.MaxWeight; 0 means 1.
	Weight int `json:"weight,omitempty"`
}

// Policy is what may reach one local service, as users wrote it.
type Policy struct {
	Service    catalog.Name           `json:"service"`
	Intentions []intentions.Intention `json:"intentions"`
	// Unreadable, if not empty, says what Assemble did not understand in it.
	// Such a policy denies everything. It is never written.
	Unreadable string `json:"-"`
}

// Compile returns the decision function of the policy for a proxy of
// trustDomain. An unreadable policy gives a nil one, which denies.
func (p Policy) Compile(trustDomain string) (*intentions.Policy, error) {
	if p.Unreadable != "" {
		return nil, nil
	}
	return intentions.Compile(trustDomain, p.Service, p.Intentions)
}
