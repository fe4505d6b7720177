package server_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server"
)

func TestConfig(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, text string
		fields     []string
	}{
		{"the reference's", `
			trust_domain         = "mesh.example.com"
			cluster_key_file     = "/etc/meshd/cluster.key"
			bootstrap_token_file = "/etc/meshd/bootstrap.token"
			ca {
				leaf_ttl = "24h"
				node_ttl = "720h"
				provider = "builtin"
			}`, nil},
		{"everything", `
			trust_domain = "mesh.example.com"
			name         = "server-1"
			data_dir     = "/var/lib/x"
			bind         = "::"
			port         = 7400
			advertise    = "mesh.example.com:443"
			admin_socket = "/run/x.sock"
			snapshots {
				enabled     = true
				interval    = "15m"
				retain      = 96
				retain_days = 30
				max_mib     = 4096
				dir         = "/srv/backup"
			}
			audit {
				file_mib = 256
				retain   = 40
			}`, nil},
		{"nothing", ``, []string{"trust_domain"}},
		{"all wrong", `
			trust_domain = "Mesh"
			name         = "a.b"
			data_dir     = "x"
			bind         = "eth0"
			advertise    = "0.0.0.0"
			ca {
				leaf_ttl = "1m"
				node_ttl = "1000h"
				provider = "acme"
			}
			snapshots {
				interval = "1s"
				retain   = -1
				dir      = "x"
			}
			audit {
				file_mib = -1
				retain   = -1
			}`, []string{"audit.file_mib", "audit.retain", "snapshots.interval", "snapshots.retain", "snapshots.dir", "trust_domain", "name", "data_dir", "bind", "advertise", "ca.provider", "ca.leaf_ttl", "ca.node_ttl"}},
	} {
		err := manifest.DecodeConfig("server.hcl", []byte(row.text), &server.Config{})
		var fields []string
		for _, e := range manifest.Errors(err) {
			fields = append(fields, e.Field)
		}
		slices.Sort(fields)
		slices.Sort(row.fields)
		if diff := cmp.Diff(row.fields, fields); diff != "" {
			t.Errorf("%s (-want +got):\n%s", row.name, diff)
		}
	}
	unknown := "trust_domain = \"a.b\"\nretry_joyn = []\n"
	if err := manifest.DecodeConfig("server.hcl", []byte(unknown), &server.Config{}); err == nil || !strings.Contains(err.Error(), "retry_joyn") {
		t.Errorf("an unknown key: %v", err)
	}
}
