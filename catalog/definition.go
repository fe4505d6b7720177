package catalog

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// DefaultAddress is where an application listens, and where its upstreams
// listen for it, unless its definition says otherwise.
const DefaultAddress = "127.0.0.1"

// A Definition is what an operator writes for an agent about one instance of a
// service: one service block of services.d.
type Definition struct {
	Name string `json:"name"`
	// ID tells apart the instances of one service on one node; it is Name when
	// empty.
	ID string `json:"id,omitempty"`
	// Namespace is DefaultNamespace when empty.
	Namespace string `json:"namespace,omitempty"`
	// Port is the number of a single port, called DefaultPort. Port and Ports
	// exclude each other; neither means a pure client.
	Port  uint16           `json:"port,omitzero"`
	Ports []DefinitionPort `json:"ports,omitempty"`
	// Protocol is that of Port.
	Protocol Protocol `json:"protocol,omitempty"`
	// Upgrade is that of Port, see ServicePort.
	Upgrade bool `json:"upgrade,omitzero"`
	// Address is the IP address on which the application listens;
	// DefaultAddress when empty.
	Address string `json:"address,omitempty"`
	// External is the host name or IP address of a destination outside the mesh,
	// which this node's proxy connects to in the application's place. It excludes
	// Address.
	External string `json:"external,omitempty"`
	// TLS protects the connection to External; nil: it is plain.
	TLS *ExternalTLS `json:"tls,omitempty"`
	// Weight is the instance's part of the service's traffic in proportion to
	// others, 1 to MaxWeight; 1 when 0.
	Weight    int               `json:"weight,omitzero"`
	Tags      []string          `json:"tags,omitempty"`
	Meta      map[string]string `json:"meta,omitempty"`
	Checks    []Check           `json:"checks,omitempty"`
	Upstreams []Upstream        `json:"upstreams,omitempty"`
}

// ExternalTLS is TLS with a destination outside the mesh.
type ExternalTLS struct {
	// ServerName is asked for and demanded of the certificate; External when empty.
	ServerName string `json:"server_name,omitempty"`
	// CAFile is the absolute path of a PEM file with the roots that the certificate
	// must chain to; those of the host when empty.
	CAFile string `json:"ca_file,omitempty"`
}

// A DefinitionPort is one of several named ports of an application.
type DefinitionPort struct {
	Name     string   `json:"name"`
	Port     uint16   `json:"port"`
	Protocol Protocol `json:"protocol,omitempty"`
	// Default marks the port of callers that name none.
	Default bool `json:"default,omitzero"`
	// Upgrade is as for ServicePort.
	Upgrade bool `json:"upgrade,omitzero"`
}

// An Upstream is a service that the application calls: mesh-proxy listens on
// the local address and port, and carries what arrives there to the service.
type Upstream struct {
	// Service is "service" (in DefaultNamespace) or "namespace/service".
	Service string `json:"service"`
	// Port is the name of the service's port; its default port when empty.
	Port string `json:"port,omitempty"`
	// LocalPort and LocalSocket exclude each other.
	LocalPort uint16 `json:"local_port,omitzero"`
	// LocalAddress is an IP address; DefaultAddress when empty.
	LocalAddress string `json:"local_address,omitempty"`
	// LocalSocket is the absolute path of a unix socket.
	LocalSocket string `json:"local_socket,omitempty"`
	// LocalSocketMode is its mode, see ParseSocketMode.
	LocalSocketMode string `json:"local_socket_mode,omitempty"`
	Limits          Limits `json:"limits,omitzero"`
}

// Limits bound what one host sends to one port of a service at a time. 0 is the
// proxy's default.
type Limits struct {
	// Connections are TCP sessions. An HTTP request counts as one while it runs.
	Connections int `json:"connections,omitzero"`
	// Pending are connections that are being made.
	Pending int `json:"pending,omitzero"`
	// Requests are HTTP requests under way.
	Requests int `json:"requests,omitzero"`
}

// maxLimit is the highest value of a limit.
const maxLimit = 1_000_000

// Validate reports every problem of the limits; see FieldErrors.
func (l Limits) Validate() error {
	var p Problems
	for _, one := range []struct {
		field string
		value int
	}{{"connections", l.Connections}, {"pending", l.Pending}, {"requests", l.Requests}} {
		if one.value < 0 || one.value > maxLimit {
			p.Add(one.field, "%d: write 1 to %d; who shall send nothing gets no intention", one.value, maxLimit)
		}
	}
	return p.Err()
}

// Lower returns the lower one of each limit that l and o set.
func (l Limits) Lower(o Limits) Limits {
	lower := func(a, b int) int {
		if a == 0 || b == 0 {
			return max(a, b)
		}
		return min(a, b)
	}
	return Limits{lower(l.Connections, o.Connections), lower(l.Pending, o.Pending), lower(l.Requests, o.Requests)}
}

// Ref returns the name of the service that is called; the zero Name when
// Service is malformed, which Validate reports.
func (u Upstream) Ref() Name {
	n, err := ParseName(u.Service)
	if err != nil {
		return Name{}
	}
	return n
}

// Ref returns the name of the defined service with its namespace resolved.
func (d Definition) Ref() Name { return Name{Namespace: orDefault(d.Namespace), Name: d.Name} }

// InstanceID returns ID, or Name when that is empty.
func (d Definition) InstanceID() string {
	if d.ID == "" {
		return d.Name
	}
	return d.ID
}

// WithDefaults returns a copy in which every default is written out; a single
// Port becomes the one entry of Ports. It shares nothing with d that a caller
// could change, except Tags, Meta and the headers of checks.
func (d Definition) WithDefaults() Definition {
	d.ID = d.InstanceID()
	d.Namespace = orDefault(d.Namespace)
	d.Ports = d.allPorts()
	d.Port, d.Protocol, d.Upgrade = 0, "", false
	for i := range d.Ports {
		d.Ports[i].Protocol = d.Ports[i].Protocol.OrAuto()
	}
	if len(d.Ports) == 1 {
		d.Ports[0].Default = true
	}
	if d.Address == "" && d.External == "" {
		d.Address = DefaultAddress
	}
	d.Checks = slices.Clone(d.Checks)
	if len(d.Checks) == 0 {
		d.Checks = d.externalChecks()
	}
	for i := range d.Checks {
		d.Checks[i] = d.Checks[i].WithDefaults()
	}
	d.Upstreams = slices.Clone(d.Upstreams)
	for i := range d.Upstreams {
		if n := d.Upstreams[i].Ref(); !n.IsZero() {
			d.Upstreams[i].Service = n.String()
		}
		switch u := &d.Upstreams[i]; {
		case u.LocalSocket != "" && u.LocalSocketMode == "":
			u.LocalSocketMode = DefaultSocketMode
		case u.LocalSocket == "" && u.LocalAddress == "":
			u.LocalAddress = DefaultAddress
		}
	}
	return d
}

// externalInterval is how often a destination outside the mesh is connected to,
// where its definition has no check.
const externalInterval = Duration(10 * time.Second)

// externalChecks are those of a destination outside the mesh without any: nobody
// on this host would notice that it is gone.
func (d Definition) externalChecks() []Check {
	if d.External == "" {
		return nil
	}
	var checks []Check
	for _, p := range d.allPorts() {
		c := Check{Name: "reachable", TCP: net.JoinHostPort(d.External, strconv.Itoa(int(p.Port))), Interval: externalInterval}
		if len(d.Ports) > 1 {
			c.Name += "-" + p.Name
		}
		checks = append(checks, c)
	}
	return checks
}

// Authority is what HTTP requests to a port of External are called by: the name
// that TLS asks for, or External, with the port where it is not the usual one.
func (d Definition) Authority(port uint16) string {
	name, usual := d.External, uint16(80)
	if d.TLS != nil {
		usual = 443
		if d.TLS.ServerName != "" {
			name = d.TLS.ServerName
		}
	}
	if port != usual {
		return net.JoinHostPort(name, strconv.Itoa(int(port)))
	}
	if strings.Contains(name, ":") {
		return "[" + name + "]"
	}
	return name
}

// Host is where the application of a definition with defaults listens: Address,
// or External.
func (d Definition) Host() string {
	if d.External != "" {
		return d.External
	}
	return d.Address
}

// allPorts returns a fresh list of the ports, the single one included.
func (d Definition) allPorts() []DefinitionPort {
	if d.Port != 0 && len(d.Ports) == 0 {
		return []DefinitionPort{{Name: DefaultPort, Port: d.Port, Protocol: d.Protocol, Upgrade: d.Upgrade}}
	}
	return slices.Clone(d.Ports)
}

// Service returns what the definition says of the central service: the spec to
// create when there is none, and to compare by Service.Agrees when there is
// one.
func (d Definition) Service() Service {
	s := Service{Namespace: d.Namespace, Name: d.Name}
	for _, p := range d.allPorts() {
		s.Ports = append(s.Ports, ServicePort{Name: p.Name, Protocol: p.Protocol, Default: p.Default, Upgrade: p.Upgrade})
	}
	return s
}

// Instance returns the instance that the definition declares on a node whose
// proxy receives at meshAddress. A pure client has no ports and no mesh
// address. The server names of the ports are left empty: their grammar belongs
// to package proxy. Tags and Meta are shared with d.
func (d Definition) Instance(node, meshAddress string) Instance {
	i := Instance{
		Namespace: d.Namespace, Service: d.Name, ID: d.InstanceID(), Node: node,
		Tags: d.Tags, Meta: d.Meta, Weight: d.Weight, External: d.External,
	}
	for _, p := range d.allPorts() {
		i.Ports = append(i.Ports, InstancePort{Name: p.Name, Port: p.Port})
	}
	if len(i.Ports) > 0 {
		i.MeshAddress = meshAddress
	}
	return i
}

// Limits of one definition.
const (
	maxChecks    = 64
	maxUpstreams = 256
)

// Validate reports every problem of the definition; see FieldErrors.
func (d Definition) Validate() error {
	var p Problems
	p.label("name", d.Name)
	if d.ID != "" {
		p.instanceID("id", d.ID)
	}
	p.namespace("namespace", d.Namespace)
	d.validatePorts(&p)
	p.address("address", d.Address)
	p.external("external", d.External)
	switch {
	case d.External != "" && d.Address != "":
		p.Add("external", "excludes address: the application is here, or it is outside the mesh")
	case d.External != "" && d.Port == 0 && len(d.Ports) == 0:
		p.Add("external", "has no effect without a port: write the port to connect to")
	}
	if d.TLS != nil {
		if d.External == "" {
			p.Add("tls", "is for a destination outside the mesh: add external, or remove it; between hosts everything is encrypted anyway")
		}
		p.external("tls.server_name", d.TLS.ServerName)
		if d.TLS.CAFile != "" && !filepath.IsAbs(d.TLS.CAFile) {
			p.Add("tls.ca_file", "%q is relative: write an absolute path", d.TLS.CAFile)
		}
	}
	p.weight("weight", d.Weight)
	p.tags("tags", d.Tags)
	p.meta("meta", d.Meta)
	if len(d.Checks) > maxChecks {
		p.Add("checks", "%d checks, at most %d are allowed", len(d.Checks), maxChecks)
	}
	for i, c := range d.Checks {
		at := fmt.Sprintf("checks[%d]", i)
		p.Under(at, c.Validate())
		if slices.ContainsFunc(d.Checks[:i], func(o Check) bool { return o.Name == c.Name }) {
			p.Add(at+".name", "%q is the name of another check: give each its own", c.Name)
		}
	}
	if len(d.Upstreams) > maxUpstreams {
		p.Add("upstreams", "%d upstreams, at most %d are allowed", len(d.Upstreams), maxUpstreams)
	}
	for i, u := range d.Upstreams {
		at := fmt.Sprintf("upstreams[%d]", i)
		p.Under(at, u.Validate())
		d.localClash(&p, at, i)
	}
	return p.Err()
}

func (d Definition) validatePorts(p *Problems) {
	switch {
	case d.Port != 0 && len(d.Ports) > 0:
		p.Add("port", "port and ports exclude each other: give a single number, or only named ports")
	case len(d.Ports) > 0 && d.Protocol != "":
		p.Add("protocol", "belongs to a single port: write protocol inside each of ports")
	case d.Port == 0 && len(d.Ports) == 0 && d.Protocol != "":
		p.Add("protocol", "has no effect without a port: add the port, or remove protocol for a pure client")
	case len(d.Ports) > 0 && d.Upgrade:
		p.Add("upgrade", "belongs to a single port: write upgrade inside each of ports")
	default:
		p.protocol("protocol", d.Protocol)
		p.upgrade("upgrade", d.Upgrade, d.Protocol)
	}
	named := make([]ServicePort, len(d.Ports))
	for i, port := range d.Ports {
		named[i] = ServicePort{Name: port.Name, Protocol: port.Protocol, Default: port.Default, Upgrade: port.Upgrade}
		at := fmt.Sprintf("ports[%d].port", i)
		if port.Port == 0 {
			p.Add(at, "missing: write the number on which the application listens, 1 to 65535")
		} else if slices.ContainsFunc(d.Ports[:i], func(o DefinitionPort) bool { return o.Port == port.Port }) {
			p.Add(at, "%d is the number of another port: each needs its own", port.Port)
		}
	}
	p.ports("ports", named)
}

// localClash records that upstream i listens where an earlier one or the
// application itself does.
func (d Definition) localClash(p *Problems, at string, i int) {
	u := d.Upstreams[i]
	for n, o := range d.Upstreams[:i] {
		if u.LocalSocket != "" && o.LocalSocket == u.LocalSocket {
			p.Add(at+".local_socket", "%q is taken by upstreams[%d]: choose another", u.LocalSocket, n)
			return
		}
	}
	if u.LocalPort == 0 {
		return
	}
	local := orLoopback(u.LocalAddress)
	for n, o := range d.Upstreams[:i] {
		if o.LocalPort == u.LocalPort && orLoopback(o.LocalAddress) == local {
			p.Add(at+".local_port", "%d is taken by upstreams[%d]: choose another", u.LocalPort, n)
			return
		}
	}
	for _, port := range d.allPorts() {
		if d.External == "" && port.Port == u.LocalPort && orLoopback(d.Address) == local {
			p.Add(at+".local_port", "%d is the application's own port: choose another", u.LocalPort)
			return
		}
	}
}

func orLoopback(address string) string {
	if address == "" {
		return DefaultAddress
	}
	return address
}

// Validate reports every problem of the upstream; see FieldErrors.
func (u Upstream) Validate() error {
	var p Problems
	if _, err := ParseName(u.Service); err != nil {
		p.Add("service", "%v; write \"service\" or \"namespace/service\"", err)
	}
	if u.Port != "" {
		p.label("port", u.Port)
	}
	switch {
	case u.LocalSocket == "" && u.LocalSocketMode != "":
		p.Add("local_socket_mode", "has no effect without local_socket: remove it")
	case u.LocalSocket != "" && (u.LocalPort != 0 || u.LocalAddress != ""):
		p.Add("local_socket", "excludes local_port and local_address: write one or the other")
	case u.LocalSocket != "":
		p.Under("local_socket", CheckSocketPath(u.LocalSocket))
		_, err := ParseSocketMode(u.LocalSocketMode)
		p.Under("local_socket_mode", err)
	case u.LocalPort == 0:
		p.Add("local_port", "missing: write the local port on which the application reaches this service, 1 to 65535, or a local_socket")
	}
	p.address("local_address", u.LocalAddress)
	p.Under("limits", u.Limits.Validate())
	return p.Err()
}

// address records a problem of the optional IP address v at path.
func (p *Problems) address(path, v string) {
	if v == "" {
		return
	}
	a, err := netip.ParseAddr(v)
	switch {
	case err != nil:
		p.Add(path, "%q is no IP address: write one such as %q", v, DefaultAddress)
	case a.IsUnspecified() || a.IsMulticast():
		p.Add(path, "%q cannot be connected to: write the one address to use, such as %q", v, DefaultAddress)
	}
}

// maxHost is the length of a host name (RFC 1035, section 2.3.4, without the final
// dot).
const maxHost = 253

// external records a problem of the optional host name or IP address v at path. A
// name is one as DNS and /etc/hosts have them (RFC 1123, section 2.1, and "_").
func (p *Problems) external(path, v string) {
	if v == "" {
		return
	}
	if a, err := netip.ParseAddr(v); err == nil {
		if a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Zone() != "" {
			p.Add(path, "%q cannot be a destination: write the one address to connect to", v)
		}
		return
	}
	good := len(v) <= maxHost
	numeric := true // like an IP address, which it is not
	for label := range strings.SplitSeq(v, ".") {
		for i := range len(label) {
			c := label[i]
			digit := c >= '0' && c <= '9'
			good = good && (digit || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_')
			numeric = numeric && digit
		}
		good = good && label != "" && len(label) <= maxLabel && label[0] != '-' && label[len(label)-1] != '-'
	}
	if !good || numeric {
		p.Add(path, "%q is neither a host name nor an IP address: write one such as \"db.example.com\"; the port has a field of its own", v)
	}
}
