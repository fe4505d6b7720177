package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/peer"
)

// Defaults of Config.
const (
	DefaultPort     = 7400
	DefaultPeerPort = 7401
	DefaultDataDir  = "/var/lib/meshd/server"
	// DefaultRemoveDeadAfter is Autopilot's.
	DefaultRemoveDeadAfter = 10 * time.Minute
)

// maxExpected bounds bootstrap_expect: with more voters every write waits for
// more disks, and nothing is gained.
const maxExpected = 7

// ProviderBuiltin is the certificate authority that needs nothing outside of
// meshd.
const ProviderBuiltin = "builtin"

// Config is server.hcl. Everything but trust_domain has a default.
type Config struct {
	// TrustDomain is the cluster's for ever.
	TrustDomain string `json:"trust_domain"`
	// Name is this server's, for ever: the short host name at the first start,
	// unless set. It is kept in DataDir.
	Name string `json:"name,omitempty"`
	// DataDir holds the state; mode 0700.
	DataDir string `json:"data_dir,omitempty"`
	// ClusterKeyFile is the same on every server. By default it is cluster.key in
	// DataDir, which is made at the first start.
	ClusterKeyFile string `json:"cluster_key_file,omitempty"`
	// BootstrapTokenFile holds the first admin token, which is read while the
	// cluster has none. By default one is made and written to admin.token in
	// DataDir.
	BootstrapTokenFile string `json:"bootstrap_token_file,omitempty"`
	// Bind is the IP address to listen at; by default all of the machine.
	Bind string `json:"bind,omitempty"`
	// Port is that of the API, HTTPS and gRPC; 0 takes DefaultPort.
	Port uint16 `json:"port,omitempty"`
	// Advertise is the host name or IP address, or host:port, under which agents
	// reach this server: Bind if that is one address, else an address of the
	// machine.
	Advertise string `json:"advertise,omitempty"`
	// AdminSocket is the unix socket on which this server's own user and root are
	// admins; admin.sock in DataDir by default.
	AdminSocket string `json:"admin_socket,omitempty"`
	CA          CA     `json:"ca,omitzero"`

	// BootstrapExpect is how many servers begin the cluster together: 1, 3, 5 or 7.
	// 0 is 1 without RetryJoin, and with it: join a cluster, never begin one.
	BootstrapExpect int `json:"bootstrap_expect,omitempty"`
	// RetryJoin lists where other servers are, as host, host:port or IP address; a
	// name with a leading underscore is looked up as DNS SRV. It may name this
	// server too, so that all can have the same list.
	RetryJoin []string `json:"retry_join,omitempty"`
	// PeerPort is where servers talk to each other; 0 takes DefaultPeerPort. The
	// address is Bind's, and the host of Advertise.
	PeerPort uint16 `json:"peer_port,omitempty"`
	// NonVoter makes a server that serves and follows, but has no vote: a copy that
	// costs the others no time.
	NonVoter  bool      `json:"non_voter,omitempty"`
	Autopilot Autopilot `json:"autopilot,omitzero"`
	Snapshots Snapshots `json:"snapshots,omitzero"`
	Audit     Audit     `json:"audit,omitzero"`

	// LogLevel is debug, info, warn or error; info by default.
	LogLevel string `json:"log_level,omitempty"`

	// Version is the program's, for status.
	Version string `json:"-"`
	// Listener, if set, is used in place of Bind and Port, and closed by Run.
	Listener net.Listener `json:"-"`
	// PeerListener, if set, is used in place of Bind and PeerPort, and closed by Run.
	// A server with a Listener and no PeerListener is alone: it does not listen for
	// others, and nobody can join it.
	PeerListener net.Listener `json:"-"`
}

func (c Config) alone() bool { return c.Listener != nil && c.PeerListener == nil }

// Autopilot is the block autopilot of server.hcl: what the leader does for the
// cluster by itself.
type Autopilot struct {
	// RemoveDeadAfter is after how long a server that can't be reached loses its
	// place, if three voters remain without it: 10 m by default, at least 10 s.
	RemoveDeadAfter catalog.Duration `json:"remove_dead_after,omitzero"`
}

// settings is what a support bundle tells of server.hcl: these fields and no
// others, so that a secret which is added to Config one day stays out by itself.
type settings struct {
	Version            string `json:"version"`
	TrustDomain        string `json:"trust_domain"`
	Name               string `json:"name"`
	DataDir            string `json:"data_dir"`
	ClusterKeyFile     string `json:"cluster_key_file,omitempty"`     // its path
	BootstrapTokenFile string `json:"bootstrap_token_file,omitempty"` // its path
	Bind               string `json:"bind,omitempty"`
	Port               uint16 `json:"port"`
	Advertise          string `json:"advertise,omitempty"`
	AdminSocket        string `json:"admin_socket"`
	Provider           string `json:"ca_provider,omitempty"`
	LeafTTL            string `json:"ca_leaf_ttl"` // 0s: the default
	NodeTTL            string `json:"ca_node_ttl"`

	BootstrapExpect int       `json:"bootstrap_expect"`
	RetryJoin       []string  `json:"retry_join,omitempty"`
	PeerPort        uint16    `json:"peer_port"`
	NonVoter        bool      `json:"non_voter,omitempty"`
	RemoveDeadAfter string    `json:"autopilot_remove_dead_after"`
	Snapshots       Snapshots `json:"snapshots"`
	LogLevel        string    `json:"log_level,omitempty"`
	Audit           Audit     `json:"audit"`
}

func (c Config) settings() settings {
	return settings{
		Version: c.Version, TrustDomain: c.TrustDomain, Name: c.Name, DataDir: c.DataDir, ClusterKeyFile: c.ClusterKeyFile,
		BootstrapTokenFile: c.BootstrapTokenFile, Bind: c.Bind, Port: c.Port, Advertise: c.Advertise, AdminSocket: c.AdminSocket,
		Provider: c.CA.Provider, LeafTTL: c.CA.LeafTTL.Std().String(), NodeTTL: c.CA.NodeTTL.Std().String(),
		BootstrapExpect: c.BootstrapExpect, RetryJoin: c.RetryJoin, PeerPort: c.PeerPort, NonVoter: c.NonVoter,
		RemoveDeadAfter: c.Autopilot.RemoveDeadAfter.Std().String(), Snapshots: c.Snapshots, Audit: c.Audit, LogLevel: c.LogLevel,
	}
}

// CA is the block ca of server.hcl.
type CA struct {
	Provider string `json:"provider,omitempty"` // ProviderBuiltin
	// LeafTTL and NodeTTL are between ca.MinTTL and ca.MaxTTL: 24 h and 720 h by
	// default.
	LeafTTL catalog.Duration `json:"leaf_ttl,omitzero"`
	NodeTTL catalog.Duration `json:"node_ttl,omitzero"`
}

func (c CA) builtin() builtin.Config {
	return builtin.Config{LeafTTL: c.LeafTTL.Std(), NodeTTL: c.NodeTTL.Std()}
}

// Validate reports every problem as catalog.FieldErrors. It does no I/O.
func (c Config) Validate() error {
	var p catalog.Problems
	if c.TrustDomain == "" {
		p.Add("trust_domain", "missing: choose a name such as \"mesh.example.com\"; it can't be changed later")
	} else if _, err := spiffe.ParseTrustDomain(c.TrustDomain); err != nil {
		p.Add("trust_domain", "%v", err)
	}
	if c.Name != "" {
		if err := catalog.CheckLabel(c.Name); err != nil {
			p.Add("name", "%v", err)
		}
	}
	for _, path := range []struct{ field, value string }{
		{"data_dir", c.DataDir},
		{"cluster_key_file", c.ClusterKeyFile},
		{"bootstrap_token_file", c.BootstrapTokenFile},
		{"admin_socket", c.AdminSocket},
		{"snapshots.dir", c.Snapshots.Dir},
	} {
		if path.value != "" && !filepath.IsAbs(path.value) {
			p.Add(path.field, "%q is relative: write an absolute path", path.value)
		}
	}
	// The limit is that of sockaddr_un.sun_path, with its final zero byte.
	if path := c.withDefaults().AdminSocket; len(path) > 107 {
		p.Add("admin_socket", "%q has %d bytes, a unix socket's path has at most 107: set a shorter one", path, len(path))
	}
	if c.Bind != "" {
		if _, err := netip.ParseAddr(c.Bind); err != nil {
			p.Add("bind", "%q is no IP address", c.Bind)
		}
	}
	if c.Advertise != "" {
		if host, _ := splitAdvertise(c.Advertise, DefaultPort); !isHost(host) {
			p.Add("advertise", "%q is no host name, IP address or host:port that agents can reach", c.Advertise)
		}
	}
	if c.CA.Provider != "" && c.CA.Provider != ProviderBuiltin {
		p.Add("ca.provider", "%q is not known: write %q", c.CA.Provider, ProviderBuiltin)
	}
	for _, ttl := range []struct {
		field string
		value catalog.Duration
	}{{"ca.leaf_ttl", c.CA.LeafTTL}, {"ca.node_ttl", c.CA.NodeTTL}} {
		if v := ttl.value.Std(); v != 0 && (v < ca.MinTTL || v > ca.MaxTTL) {
			p.Add(ttl.field, "%s is out of range: write %s to %s", v, ca.MinTTL, ca.MaxTTL)
		}
	}
	if c.LogLevel != "" && new(slog.Level).UnmarshalText([]byte(c.LogLevel)) != nil {
		p.Add("log_level", "%q is not known: write debug, info, warn or error", c.LogLevel)
	}
	c.validateCluster(&p)
	c.Snapshots.validate(&p)
	c.Audit.validate(&p)
	return p.Err() //nolint:wrapcheck // field errors are the result
}

func (c Config) validateCluster(p *catalog.Problems) {
	switch n := c.BootstrapExpect; {
	case n < 0 || n > maxExpected:
		p.Add("bootstrap_expect", "%d is out of range: write 1, 3, 5 or 7", n)
	case n != 0 && n%2 == 0:
		p.Add("bootstrap_expect", "%d servers survive the loss of no more than %d do: write %d or %d", n, n-1, n-1, n+1)
	case n > 1 && len(c.RetryJoin) == 0:
		p.Add("retry_join", "missing: bootstrap_expect is %d, so say where the other servers are", n)
	case n > 0 && c.NonVoter:
		p.Add("non_voter", "a server without a vote can't begin a cluster: leave bootstrap_expect out")
	}
	if len(c.RetryJoin) > 0 && c.ClusterKeyFile == "" {
		p.Add("cluster_key_file", "missing: servers admit each other by the cluster key, so all need the same; make it once with meshctl operator keygen")
	}
	if c.NonVoter && len(c.RetryJoin) == 0 {
		p.Add("retry_join", "missing: a server without a vote joins others")
	}
	for i, join := range c.RetryJoin {
		if err := peer.CheckJoin(join); err != nil {
			p.Add(fmt.Sprintf("retry_join[%d]", i), "%v", err)
		}
	}
	if c.withDefaults().Port == c.withDefaults().PeerPort {
		p.Add("peer_port", "%d is the port for agents and clients: take another", c.PeerPort)
	}
	if d := c.Autopilot.RemoveDeadAfter.Std(); d != 0 && d < minRemoveDead {
		p.Add("autopilot.remove_dead_after", "%s is too short to tell a dead server from one that restarts: write at least %s", d, minRemoveDead)
	}
}

// minRemoveDead is the shortest remove_dead_after.
const minRemoveDead = 10 * time.Second

func (c Config) withDefaults() Config {
	if c.DataDir == "" {
		c.DataDir = DefaultDataDir
	}
	if c.AdminSocket == "" {
		c.AdminSocket = filepath.Join(c.DataDir, "admin.sock")
	}
	if c.Port == 0 {
		c.Port = DefaultPort
	}
	if c.PeerPort == 0 {
		c.PeerPort = DefaultPeerPort
	}
	if c.BootstrapExpect == 0 && len(c.RetryJoin) == 0 {
		c.BootstrapExpect = 1
	}
	c.Snapshots, c.Audit = c.Snapshots.withDefaults(c.DataDir), c.Audit.withDefaults()
	if c.Autopilot.RemoveDeadAfter == 0 {
		c.Autopilot.RemoveDeadAfter = catalog.Duration(DefaultRemoveDeadAfter)
	}
	return c
}

// splitAdvertise takes "host", "host:port", "::1" or "[::1]:port" apart.
func splitAdvertise(s string, port uint16) (host, number string) {
	number = fmt.Sprint(port)
	if _, err := netip.ParseAddr(s); err == nil {
		return s, number
	}
	if h, p, err := net.SplitHostPort(s); err == nil {
		return h, p
	}
	return s, number
}

// isHost reports whether agents could connect to it.
func isHost(s string) bool {
	if addr, err := netip.ParseAddr(s); err == nil {
		return !addr.IsUnspecified() && !addr.IsMulticast()
	}
	_, err := spiffe.ParseTrustDomain(s) // the grammar of lower-case host names
	return err == nil
}

// advertised returns host and port under which agents reach the listener.
func (c Config) advertised(ctx context.Context, listener net.Addr) (host, port string, err error) {
	number := c.Port
	if tcp, ok := listener.(*net.TCPAddr); ok {
		number = uint16(tcp.Port) //nolint:gosec // a port
		if c.Advertise == "" && !tcp.IP.IsUnspecified() {
			return tcp.IP.String(), fmt.Sprint(number), nil
		}
	}
	if c.Advertise != "" {
		host, port = splitAdvertise(c.Advertise, number)
		return host, port, nil
	}
	host, err = machineAddress(ctx)
	return host, fmt.Sprint(number), err
}

// machineAddress picks an address of this machine: the one that packets to others
// leave from, else any; IPv4 before IPv6, private ones too, never link-local ones;
// loopback if there is nothing else.
func machineAddress(ctx context.Context) (string, error) {
	// Connecting UDP asks the routing table and sends nothing. The addresses are
	// documentation's (RFC 5737, RFC 3849), so only a default route leads there.
	for _, far := range []struct{ network, address string }{{"udp4", "192.0.2.1:9"}, {"udp6", "[2001:db8::1]:9"}} {
		var d net.Dialer
		conn, err := d.DialContext(ctx, far.network, far.address)
		if err != nil {
			continue
		}
		host, _, err := net.SplitHostPort(conn.LocalAddr().String())
		_ = conn.Close() // nothing was sent
		if err == nil && isHost(host) {
			return host, nil
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("look for an address to advertise (or set advertise): %w", err)
	}
	var usable []netip.Addr
	for _, a := range addrs {
		prefix, err := netip.ParsePrefix(a.String())
		if err == nil && prefix.Addr().IsGlobalUnicast() {
			usable = append(usable, prefix.Addr().Unmap())
		}
	}
	slices.SortStableFunc(usable, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	if len(usable) == 0 {
		return "127.0.0.1", nil
	}
	return usable[0].String(), nil
}

// serverName settles the server's name at the first start and keeps it: the store
// knows its members by name, so another one would be another member.
func serverName(configured, dataDir string) (string, error) {
	path := filepath.Join(dataDir, "name")
	kept, err := os.ReadFile(path) //nolint:gosec // our own directory
	if err == nil {
		name := strings.TrimSpace(string(kept))
		if configured != "" && configured != name {
			return "", fmt.Errorf("this server was started as %q, and a server keeps its name: set name = %q, or use another data_dir", name, name)
		}
		if err := catalog.CheckLabel(name); err != nil {
			return "", fmt.Errorf("read the server's name from %s: %w", path, err)
		}
		return name, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the server's name: %w", err)
	}
	name := configured
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return "", fmt.Errorf("take the host's name as the server's (or set name): %w", err)
		}
		name, _, _ = strings.Cut(strings.ToLower(host), ".")
	}
	if err := catalog.CheckLabel(name); err != nil {
		return "", fmt.Errorf("take the host's name as the server's: %w; set name", err)
	}
	return name, writePrivate(path, []byte(name+"\n"))
}
