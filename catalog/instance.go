package catalog

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
)

// An Instance is one running copy of a service, registered by the agent of its
// node.
type Instance struct {
	// Namespace is DefaultNamespace when empty.
	Namespace string `json:"namespace,omitempty"`
	Service   string `json:"service"`
	// ID is unique among the instances of one service on one node.
	ID   string `json:"id"`
	Node string `json:"node"`
	// MeshAddress is host:port of the proxy that receives for this instance.
	MeshAddress string `json:"mesh_address,omitempty"`
	// Zone is where its node is, empty if that is not known. Callers prefer
	// instances of their own zone.
	Zone string `json:"zone,omitempty"`
	// Weight is its part of the traffic in proportion to others, 1 to
	// MaxWeight; 1 when 0.
	Weight int               `json:"weight,omitzero"`
	Ports  []InstancePort    `json:"ports,omitempty"`
	Tags   []string          `json:"tags,omitempty"`
	Meta   map[string]string `json:"meta,omitempty"`
	// External is the host name or IP address outside the mesh that the instance
	// stands for; empty: it is an application on Node.
	External string `json:"external,omitempty"`
}

// An InstancePort is a port of an instance.
type InstancePort struct {
	Name string `json:"name"`
	// Port is the application's own port, known to its node only for use.
	Port uint16 `json:"port"`
	// ServerName is the TLS server name that picks this instance and port on
	// the mesh address.
	ServerName string `json:"server_name,omitempty"`
}

// An InstanceKey identifies an instance. It is comparable.
type InstanceKey struct {
	Service  Name
	Node, ID string
}

// String returns "namespace/service/node/id".
func (k InstanceKey) String() string { return k.Service.String() + "/" + k.Node + "/" + k.ID }

// Compare orders keys by service, node and ID, as cmp.Compare does.
func (k InstanceKey) Compare(o InstanceKey) int {
	if c := k.Service.Compare(o.Service); c != 0 {
		return c
	}
	if c := strings.Compare(k.Node, o.Node); c != 0 {
		return c
	}
	return strings.Compare(k.ID, o.ID)
}

// Ref returns the name of the instance's service with its namespace resolved.
func (i Instance) Ref() Name { return Name{Namespace: orDefault(i.Namespace), Name: i.Service} }

// Key returns the identity of the instance.
func (i Instance) Key() InstanceKey { return InstanceKey{Service: i.Ref(), Node: i.Node, ID: i.ID} }

// WithDefaults returns a copy with the namespace written out. Ports, Tags and
// Meta are shared with i.
func (i Instance) WithDefaults() Instance {
	i.Namespace = orDefault(i.Namespace)
	return i
}

// Validate reports every problem of the spec; see FieldErrors.
func (i Instance) Validate() error {
	var p Problems
	p.namespace("namespace", i.Namespace)
	p.label("service", i.Service)
	p.instanceID("id", i.ID)
	p.label("node", i.Node)
	if len(i.Ports) > 0 || i.MeshAddress != "" {
		p.meshAddress("mesh_address", i.MeshAddress)
	}
	p.Zone("zone", i.Zone)
	p.weight("weight", i.Weight)
	if len(i.Ports) > maxPorts {
		p.Add("ports", "%d ports, at most %d are allowed", len(i.Ports), maxPorts)
	}
	for n, port := range i.Ports {
		at := fmt.Sprintf("ports[%d]", n)
		p.label(at+".name", port.Name)
		if slices.ContainsFunc(i.Ports[:n], func(o InstancePort) bool { return o.Name == port.Name }) {
			p.Add(at+".name", "%q is taken by another port: give each port its own name", port.Name)
		}
		if port.Port == 0 {
			p.Add(at+".port", "missing: write the application's port, 1 to 65535")
		}
		if len(port.ServerName) > maxServerName {
			p.Add(at+".server_name", "%d characters, at most %d are allowed", len(port.ServerName), maxServerName)
		}
	}
	p.tags("tags", i.Tags)
	p.meta("meta", i.Meta)
	p.external("external", i.External)
	return p.Err()
}

const (
	maxServerName = 253 // RFC 1035, section 2.3.4, without the final dot
	maxInstanceID = 128
	maxTags       = 64
	maxTag        = 128
)

// instanceID records a problem of the ID v at path. "/" is not allowed, for
// SERVICE/ID names an instance.
func (p *Problems) instanceID(path, v string) {
	if v == "" || len(v) > maxInstanceID || strings.Trim(v, instanceIDBytes) != "" || strings.Trim(v, ".") == "" {
		p.Add(path, "%q: use 1 to %d of A-Z, a-z, 0-9, \"-\", \"_\", \".\" and \":\"", v, maxInstanceID)
	}
}

// MaxWeight is the highest weight of an instance.
const MaxWeight = 100

// weight records a problem of the optional weight v at path.
func (p *Problems) weight(path string, v int) {
	if v < 0 || v > MaxWeight {
		p.Add(path, "%d: write 1 to %d; an instance that shall get nothing is drained, not weighed 0", v, MaxWeight)
	}
}

// Zone records a problem of the optional zone v at path.
func (p *Problems) Zone(path, v string) {
	if v != "" && (len(v) > maxTag || strings.Trim(v, metaKeyBytes) != "") {
		p.Add(path, "%q: use 1 to %d of A-Z, a-z, 0-9, \"-\", \"_\" and \".\"", v, maxTag)
	}
}

const instanceIDBytes = metaKeyBytes + ":"

// meshAddress records a problem of the host:port v at path.
func (p *Problems) meshAddress(path, v string) {
	host, port, err := net.SplitHostPort(v)
	if err != nil || host == "" || !printable(v) || strings.ContainsAny(v, " /@") {
		p.Add(path, "%q: write host:port, such as \"10.0.0.17:7443\" or \"[fd00::17]:7443\"", v)
		return
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		p.Add(path, "%q: the port must be a number, 1 to 65535", v)
	}
}

// tags records the problems of tags at path.
func (p *Problems) tags(path string, tags []string) {
	if len(tags) > maxTags {
		p.Add(path, "%d tags, at most %d are allowed", len(tags), maxTags)
	}
	for i, t := range tags {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case t == "" || len(t) > maxTag || !printable(t):
			p.Add(at, "%q: write 1 to %d printable characters", t, maxTag)
		case slices.Contains(tags[:i], t):
			p.Add(at, "%q is listed twice: remove one", t)
		}
	}
}
