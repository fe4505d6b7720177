package agent_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/proxy"
)

func TestConfigFile(t *testing.T) {
	t.Parallel()
	text := `
servers   = ["10.0.0.11", "10.0.0.12:7999", "fd00::1"]
node_name = "vm-017"
advertise = "10.0.0.0/8"
join {
  token_file = "/etc/meshd/other.token"
}
proxy {
  mesh_port = 8443
  supervise = true
  limits {
    head_bytes = 65536
    http2 {
      streams = 250
    }
  }
}
`
	var got agent.Config
	if err := manifest.DecodeConfig("agent.hcl", []byte(text), &got); err != nil {
		t.Fatal(err)
	}
	want := agent.Config{
		Servers: []string{"10.0.0.11", "10.0.0.12:7999", "fd00::1"}, NodeName: "vm-017", Advertise: "10.0.0.0/8",
		Join: agent.Join{TokenFile: "/etc/meshd/other.token"}, Proxy: agent.Proxy{
			MeshPort: 8443, Supervise: true,
			Limits: proxy.Limits{HeadBytes: 65536, HTTP2: proxy.HTTP2Limits{Streams: 250}},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	full := got.WithDefaults()
	if diff := cmp.Diff([]string{"10.0.0.11:7400", "10.0.0.12:7999", "[fd00::1]:7400"}, full.Servers); diff != "" {
		t.Error(diff)
	}
	if full.DataDir != agent.DefaultDataDir || full.Proxy.Socket != agent.DefaultProxySocket || full.Proxy.MeshPort != 8443 || full.Socket != agent.DefaultSocket {
		t.Errorf("defaults %+v", full)
	}
}

func TestConfigProblems(t *testing.T) {
	t.Parallel()
	rows := []struct {
		edit func(*agent.Config)
		want string
	}{
		{func(c *agent.Config) { c.Servers = []string{"ok", "a b"} }, "servers[1]"},
		{func(c *agent.Config) { c.Servers = []string{"host:0"} }, "servers[0]"},
		{func(c *agent.Config) { c.NodeName = "Not_A_Label" }, "node_name"},
		{func(c *agent.Config) { c.Advertise = "0.0.0.0" }, "advertise"},
		{func(c *agent.Config) { c.Advertise = "eth0, eth1" }, "advertise"},
		{func(c *agent.Config) { c.DataDir = "data" }, "data_dir"},
		{func(c *agent.Config) { c.ServicesDir = "services.d" }, "services_dir"},
		{func(c *agent.Config) { c.Socket = "/" + strings.Repeat("x", 107) }, "socket"},
		{func(c *agent.Config) { c.Join.TokenFile = "join.token" }, "join.token_file"},
		{func(c *agent.Config) { c.Proxy.Socket = "proxy.sock" }, "proxy.socket"},
		{func(c *agent.Config) { c.Proxy.StateDir = "state" }, "proxy.state_dir"},
		{func(c *agent.Config) { c.Proxy.MeshAddress = "eth0" }, "proxy.mesh_address"},
		{func(c *agent.Config) { c.Proxy.Binary = "mesh-proxy" }, "proxy.binary"},
		{func(c *agent.Config) { c.Proxy.Limits.Fields = -1 }, "proxy.limits.fields"},
		{func(c *agent.Config) { c.Proxy.Limits.HeadBytes, c.Proxy.Limits.LineBytes = 2048, 4096 }, "proxy.limits.line_bytes"},
		{func(c *agent.Config) { c.Proxy.Limits.HTTP2.Window = 1 << 31 }, "proxy.limits.http2.window"},
	}
	for _, row := range rows {
		c := agent.Config{NodeName: "vm-a"}
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		row.edit(&c)
		problems := catalog.FieldErrors(c.Validate())
		if len(problems) != 1 || problems[0].Field != row.want {
			t.Errorf("%s: %v", row.want, problems)
		}
	}
}
