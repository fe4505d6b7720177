package e2e_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/canary"
)

// cluster is one server with the hosts that joined it.
type cluster struct {
	t      *testing.T
	net    *network
	server *host
	daemon *process
	config string
}

const serverConfig = `
trust_domain         = "mesh.example.com"
cluster_key_file     = "%[1]s/cluster.key"
bootstrap_token_file = "%[1]s/bootstrap.token"
data_dir             = "%[1]s/data"
admin_socket         = "%[1]s/server.sock"
bind                 = "%[2]s"
advertise            = "%[2]s"
`

// adminToken is the operator's own first token.
const adminToken = "e2e-admin-token-0123456789-0123456789"

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, net: newNetwork(t)}
	c.server = c.net.host(t, "srv")
	if r := c.server.Run("meshctl", "operator", "keygen", c.server.Path("cluster.key")); r.Code != 0 {
		t.Fatalf("keygen: %s", r.Stderr)
	}
	c.server.Write(adminToken+"\n", 0o600, "bootstrap.token")
	c.config = c.server.Write(fmt.Sprintf(serverConfig, c.server.Dir, c.server.Address), 0o600, "server.hcl")
	c.startServer()
	return c
}

// startServer starts the server and waits until it answers.
func (c *cluster) startServer() {
	c.t.Helper()
	c.daemon = c.server.Start("server", "meshd", "server", "--config", c.config)
	c.server.keepMetrics(c.daemon, "--unix-socket", c.server.Path("server.sock"), "http://server/v1/metrics")
	eventually(c.t, 15*time.Second, "the server answers", func() string {
		if r := c.server.Run("meshctl", "--addr", c.admin(), "get", "nodes"); r.Code != 0 {
			return r.Stderr + tail(c.daemon.Log, 5)
		}
		return ""
	})
}

func (c *cluster) admin() string { return "unix://" + c.server.Path("server.sock") }

// meshctl runs a command on the server and demands an exit code.
func (c *cluster) meshctl(code int, args ...string) result {
	c.t.Helper()
	r := c.server.Run("meshctl", append([]string{"--addr", c.admin()}, args...)...)
	if r.Code != code {
		c.t.Fatalf("meshctl %s: exit %d, want %d\n%s%s", strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	return r
}

// member is a host with an agent and a proxy.
type member struct {
	*host
	cluster      *cluster
	agentConfig  string
	agent, proxy *process
}

const agentConfig = `
servers      = ["%[2]s:7400"]
node_name    = "%[3]s"
advertise    = "%[4]s"
data_dir     = "%[1]s/agent"
services_dir = "%[1]s/services.d"
socket       = "%[1]s/agent.sock"
join {
  token_file = "%[1]s/join.token"
}
proxy {
  socket = "%[1]s/proxy.sock"
}
metrics {
  address = "%[4]s:7490"
}
`

// join makes a host, gives it a token for the services and starts its daemons.
func (c *cluster) join(name, services string) *member {
	c.t.Helper()
	m := c.prepare(name)
	m.Write(c.token(name, services), 0o600, "join.token")
	m.startAgent()
	m.startProxy()
	return m
}

// token makes a join token.
func (c *cluster) token(node, services string) string {
	c.t.Helper()
	args := []string{"token", "join", "--node", node}
	if services != "" {
		args = append(args, "--services", services)
	}
	token := c.meshctl(0, args...).Stdout
	c.net.secrets = append(c.net.secrets, canary.Secret{Name: "a join token", Value: []byte(token)})
	return token
}

// prepare makes a host that is ready to join.
func (c *cluster) prepare(name string) *member {
	c.t.Helper()
	m := &member{host: c.net.host(c.t, name), cluster: c}
	if err := os.MkdirAll(m.Path("services.d"), 0o755); err != nil {
		c.t.Fatal(err)
	}
	m.agentConfig = m.Write(fmt.Sprintf(agentConfig, m.Dir, c.server.Address, name, m.Address), 0o600, "agent.hcl")
	return m
}

func (m *member) startAgent() {
	m.T.Helper()
	m.agent = m.Start("agent", "meshd", "agent", "--config", m.agentConfig)
	m.keepMetrics(m.agent, "http://127.0.0.1:7490/metrics")
}

func (m *member) startProxy() {
	m.T.Helper()
	m.proxy = m.Start("proxy", "mesh-proxy", "--feed", m.Path("proxy.sock"), "--state", m.Path("proxy"))
	m.keepMetrics(m.proxy, "http://127.0.0.1:7491/metrics")
}

// define writes a file of services.d.
func (m *member) define(file, content string) { m.Write(content, 0o644, "services.d", file) }

// curl sends a request from the host and returns status, headers and body.
func (h *host) curl(args ...string) (status string, headers map[string]string, body string) {
	h.T.Helper()
	head := h.Path("curl.head")
	r := h.Run("curl", append([]string{"--silent", "--show-error", "--max-time", "10", "--path-as-is", "-D", head}, args...)...)
	if r.Code != 0 {
		return fmt.Sprintf("curl exit %d: %s", r.Code, strings.TrimSpace(r.Stderr)), nil, ""
	}
	data, err := os.ReadFile(head)
	if err != nil {
		h.T.Fatal(err)
	}
	lines := strings.Split(strings.ReplaceAll(string(data), "\r", ""), "\n")
	headers = map[string]string{}
	for _, line := range lines {
		if fields := strings.Fields(line); strings.HasPrefix(line, "HTTP/") && len(fields) > 1 {
			status, headers = fields[1], map[string]string{}
		} else if k, v, ok := strings.Cut(line, ": "); ok {
			headers[strings.ToLower(k)] = v
		}
	}
	return status, headers, r.Stdout
}

// answers waits until a URL gives a status from the host.
func (h *host) answers(limit time.Duration, want string, args ...string) time.Duration {
	h.T.Helper()
	return eventually(h.T, limit, fmt.Sprintf("curl %v gives %s", args, want), func() string {
		if status, headers, _ := h.curl(args...); status != want {
			return fmt.Sprintf("%s (mesh-error %q)", status, headers["mesh-error"])
		}
		return ""
	})
}
