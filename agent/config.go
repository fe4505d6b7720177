package agent

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

// Defaults of Config.
const (
	DefaultDataDir     = "/var/lib/meshd/agent"
	DefaultServicesDir = "/etc/meshd/services.d"
	DefaultSocket      = "/run/meshd/agent.sock"
	DefaultProxySocket = "/run/meshd/proxy.sock"
	DefaultTokenFile   = "/etc/meshd/join.token" //nolint:gosec // a path, no secret
	DefaultProxyState  = "/var/lib/mesh-proxy"
	DefaultProxyUser   = "mesh-proxy"
	DefaultGroup       = "mesh"
	DefaultMeshPort    = 7443
	DefaultServerPort  = 7400
	// DefaultMetrics is the metrics endpoint of the whole host.
	DefaultMetrics = "127.0.0.1:7490"
	// DefaultProxyMetrics is where mesh-proxy serves its own.
	DefaultProxyMetrics = "127.0.0.1:7491"
)

// Config is agent.hcl. Everything has a default; a host that has not joined
// needs a join token.
type Config struct {
	// Servers are where to find the servers, host or host:port. Without any,
	// those are used that the join token named.
	Servers []string `json:"servers,omitempty"`
	// NodeName is the short host name unless set.
	NodeName string `json:"node_name,omitempty"`
	// Advertise is how other hosts reach this one's mesh port: an IP address,
	// the name of an interface, or a CIDR that one of the addresses is in. By
	// default it is the address from which the servers are reached.
	Advertise string `json:"advertise,omitempty"`
	// Zone is where the host is: a data center, a room, a rack. Traffic stays in
	// a zone while enough of a service's instances there are usable. Hosts
	// without one have no preference.
	Zone string `json:"zone,omitempty"`
	// DataDir holds keys, certificates, the view and last good definitions; mode
	// 0700.
	DataDir string `json:"data_dir,omitempty"`
	// ServicesDir is the folder of service definitions.
	ServicesDir string `json:"services_dir,omitempty"`
	// Socket is the unix socket of the local API.
	Socket string `json:"socket,omitempty"`
	// Group may use the local API and, with it, read the host's state.
	Group string `json:"group,omitempty"`
	Join  Join   `json:"join,omitzero"`
	Proxy Proxy  `json:"proxy,omitzero"`
	// Metrics is the host's one endpoint for Prometheus.
	Metrics Metrics `json:"metrics,omitzero"`

	// LogLevel is debug, info, warn or error; info by default.
	LogLevel string `json:"log_level,omitempty"`

	// Version is the program's, for the servers and for status.
	Version string `json:"-"`
}

// Join is the block join of agent.hcl.
type Join struct {
	// TokenFile is read once, and deleted when the host has joined.
	TokenFile string `json:"token_file,omitempty"`
}

// Metrics is the block metrics of agent.hcl.
type Metrics struct {
	// Address serves the metrics of agent and proxy. On loopback they are plain
	// HTTP. Elsewhere they are HTTPS for the nodes of the mesh only, and plain on
	// 127.0.0.1 with the same port, too. "off" serves none.
	Address string `json:"address,omitempty"`
}

// Proxy is the block proxy of agent.hcl.
type Proxy struct {
	// Socket is where mesh-proxy is fed.
	Socket string `json:"socket,omitempty"`
	// ID is that of the proxy to feed: the host name unless set, as mesh-proxy
	// has it.
	ID string `json:"id,omitempty"`
	// User is as whom mesh-proxy runs. It may connect to Socket, beside root and
	// the agent's own user.
	User string `json:"user,omitempty"`
	// MeshAddress is the IP address at which the mesh port listens; by default
	// all of the host.
	MeshAddress string `json:"mesh_address,omitempty"`
	MeshPort    uint16 `json:"mesh_port,omitempty"`
	// AccessLog is where mesh-proxy writes one line of JSON per request and TCP
	// connection: an absolute path, or "stdout". Empty writes none.
	AccessLog string `json:"access_log,omitempty"`
	// Limits bound what applications and other hosts can make mesh-proxy hold and
	// do.
	Limits proxy.Limits `json:"limits,omitzero"`
	// Supervise makes the agent start mesh-proxy, restart it, and end it with
	// itself: for containers and development. What follows is for it only.
	Supervise bool `json:"supervise,omitzero"`
	// Binary is the program: mesh-proxy beside this one, or of the PATH, unless
	// set.
	Binary string `json:"binary,omitempty"`
	// StateDir is where the proxy keeps its last plan.
	StateDir string `json:"state_dir,omitempty"`
	// Metrics is the loopback address of the proxy's own metrics, from where the
	// agent fetches them, supervised or not.
	Metrics string `json:"metrics,omitempty"`
}

// WithDefaults returns a copy in which every default is written out, but for
// Advertise, which is found when the agent runs.
func (c Config) WithDefaults() Config {
	host, _ := os.Hostname() // without one, Validate asks for node_name
	if c.NodeName == "" {
		short, _, _ := strings.Cut(host, ".")
		c.NodeName = strings.ToLower(short)
	}
	servers := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		servers[i] = withPort(s, DefaultServerPort)
	}
	c.Servers = servers
	c.DataDir = cmp.Or(c.DataDir, DefaultDataDir)
	c.ServicesDir = cmp.Or(c.ServicesDir, DefaultServicesDir)
	c.Socket = cmp.Or(c.Socket, DefaultSocket)
	c.Group = cmp.Or(c.Group, DefaultGroup)
	c.Join.TokenFile = cmp.Or(c.Join.TokenFile, DefaultTokenFile)
	p := &c.Proxy
	p.Socket = cmp.Or(p.Socket, DefaultProxySocket)
	p.ID = cmp.Or(p.ID, host, "host")
	p.User = cmp.Or(p.User, DefaultProxyUser)
	p.MeshPort = cmp.Or(p.MeshPort, DefaultMeshPort)
	p.StateDir = cmp.Or(p.StateDir, DefaultProxyState)
	p.Metrics = cmp.Or(p.Metrics, DefaultProxyMetrics)
	c.Metrics.Address = cmp.Or(c.Metrics.Address, DefaultMetrics)
	return c
}

// withPort completes "host" to "host:port"; a bare IPv6 address gets brackets.
func withPort(address string, port int) string {
	if _, _, err := net.SplitHostPort(address); err == nil {
		return address
	}
	return net.JoinHostPort(strings.Trim(address, "[]"), strconv.Itoa(port))
}

// Validate reports every problem as catalog.FieldErrors. It does no I/O but
// asking for the host name.
func (c Config) Validate() error {
	var p catalog.Problems
	d := c.WithDefaults()
	for i, s := range d.Servers {
		host, port, err := net.SplitHostPort(s)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || perr != nil || n == 0 || host == "" || strings.ContainsAny(host, " /@") {
			p.Add(fmt.Sprintf("servers[%d]", i), "%q is no host or host:port", c.Servers[i])
		}
	}
	if d.LogLevel != "" && new(slog.Level).UnmarshalText([]byte(d.LogLevel)) != nil {
		p.Add("log_level", "%q is not known: write debug, info, warn or error", d.LogLevel)
	}
	if err := catalog.CheckLabel(d.NodeName); err != nil {
		p.Add("node_name", "%v; set it, the host name can't be used", err)
	}
	if strings.ContainsAny(c.Advertise, " ,") {
		p.Add("advertise", "%q: write one IP address, interface or CIDR", c.Advertise)
	}
	p.Zone("zone", c.Zone)
	if ip, err := netip.ParseAddr(c.Advertise); err == nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		p.Add("advertise", "%q cannot be connected to: write the address that other hosts use", c.Advertise)
	}
	for _, path := range []struct{ field, value string }{
		{"data_dir", d.DataDir},
		{"services_dir", d.ServicesDir},
		{"socket", d.Socket},
		{"join.token_file", d.Join.TokenFile},
		{"proxy.socket", d.Proxy.Socket},
		{"proxy.state_dir", d.Proxy.StateDir},
	} {
		if !filepath.IsAbs(path.value) {
			p.Add(path.field, "%q is relative: write an absolute path", path.value)
		}
	}
	for _, path := range []struct{ field, value string }{{"socket", d.Socket}, {"proxy.socket", d.Proxy.Socket}} {
		// The limit is that of sockaddr_un.sun_path, with its final zero byte.
		if len(path.value) > 107 {
			p.Add(path.field, "%q has %d bytes, a unix socket's path has at most 107: set a shorter one", path.value, len(path.value))
		}
	}
	if a := c.Proxy.MeshAddress; a != "" {
		if _, err := netip.ParseAddr(a); err != nil {
			p.Add("proxy.mesh_address", "%q is no IP address", a)
		}
	}
	if a := c.Proxy.AccessLog; a != "" && a != proxy.AccessLogStdout && !filepath.IsAbs(a) {
		p.Add("proxy.access_log", "%q: write an absolute path, or %q", a, proxy.AccessLogStdout)
	}
	p.Under("proxy.limits", c.Proxy.Limits.Validate())
	if problem := metricsProblem(d.Metrics.Address, d.Proxy.Metrics); problem != "" {
		p.Add("metrics.address", "%q: %s", d.Metrics.Address, problem)
	}
	if c.Proxy.Binary != "" && !filepath.IsAbs(c.Proxy.Binary) {
		p.Add("proxy.binary", "%q is relative: write an absolute path", c.Proxy.Binary)
	}
	return p.Err()
}

// metricsProblem says what is wrong with the address of the host's metrics.
func metricsProblem(address, proxys string) string {
	if address == metricsOff {
		return ""
	}
	ap, err := netip.ParseAddrPort(address)
	switch {
	case err != nil || ap.Port() == 0:
		return "write IP:PORT, or " + metricsOff
	case ap.Addr().IsUnspecified() || ap.Addr().IsMulticast():
		return "write one address of the host: the port on 127.0.0.1 is served beside it"
	case address == proxys:
		return "mesh-proxy serves its own there, see proxy.metrics"
	default:
		return ""
	}
}

// meshListen is where the mesh listener binds.
func (c Config) meshListen() string {
	return net.JoinHostPort(c.Proxy.MeshAddress, strconv.Itoa(int(c.Proxy.MeshPort)))
}
