package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const nginxName = "nginx"

// nginxHop is one plain hop, with keep-alive on both sides. nginx keeps its
// connections per worker; its own metrics are a handful of counters.
func (f *field) nginxHop(ctx context.Context) error {
	addresses, files, err := f.listen(1 + clusters)
	if err != nil {
		return err
	}
	cpus, _ := f.setting.cpus()
	main := fmt.Sprintf("worker_processes %d;\nworker_rlimit_nofile 16384;\nevents { worker_connections 8192; }", len(cpus))
	var http strings.Builder
	fmt.Fprintf(&http, "  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 5m;\n"+
		"  proxy_connect_timeout 1s;\n  proxy_read_timeout 5m;\n  proxy_send_timeout 5m;\n"+
		"  server { listen %s; location /metrics { stub_status; } }\n", addresses[0])
	for c := range clusters {
		fmt.Fprintf(&http, "  upstream %s {\n    random two least_conn;\n%s    keepalive 128;\n    keepalive_requests 1000000000;\n  }\n",
			clusterName(c), strings.Repeat("    server "+f.backend+";\n", endpoints))
		fmt.Fprintf(&http, `  server {
    listen %s;
    location /admin/ { return 403; }
    location / {
      limit_except GET POST { deny all; }
%s      deny all;
      proxy_pass http://%s;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-Client-Cert "%s";
    }
  }
`, addresses[1+c], "      allow "+strings.Join(hosts(), ";\n      allow ")+";\n", clusterName(c), l7.ForwardedClientCert(api(), web()))
	}
	f.note(nginxName, main+"\nhttp {\n"+http.String()+"}")
	pid, err := f.started(rig.StartNginx(f.path(nginxName), main, http.String(), files, func(string) {}))
	if err != nil {
		return err
	}
	metrics := "http://" + addresses[0] + "/metrics"
	if _, err := load.Scrape(ctx, metrics, ""); err != nil { // then the workers are there
		return err
	}
	pids, err := rig.Family(pid)
	f.lanes = append(f.lanes, lane{scenario: plain, name: nginxName, address: addresses[1+httpCluster], parts: []part{{role: "proxy", pids: pids, metrics: metrics}}})
	return err
}
