package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const nginxConfig = `
daemon off;
worker_processes 1;
pid %[1]s/nginx-%[3]d.pid;
error_log %[1]s/nginx-%[3]d.error.log;
events { worker_connections 4096; }
http {
  access_log %[1]s/nginx-%[3]d.access.log;
  client_body_temp_path %[1]s/nginx-%[3]d-body;
  proxy_temp_path %[1]s/nginx-%[3]d-proxy;
  fastcgi_temp_path %[1]s/nginx-%[3]d-fastcgi;
  uwsgi_temp_path %[1]s/nginx-%[3]d-uwsgi;
  scgi_temp_path %[1]s/nginx-%[3]d-scgi;
  keepalive_requests 1000000;
  server {
    listen %[2]s:%[3]d;
    location / { return 200 "instance=%[4]s uri=$request_uri xfcc=$http_x_forwarded_client_cert\n"; }
  }
}
`

// nginx runs a real nginx on the host, which tells what it was asked.
func (h *host) nginx(port int, instance string) {
	h.T.Helper()
	path, err := exec.LookPath("nginx")
	if err != nil {
		path = "/usr/sbin/nginx"
	}
	conf := h.Write(fmt.Sprintf(nginxConfig, h.Dir, "127.0.0.1", port, instance), 0o644, fmt.Sprintf("nginx-%d.conf", port))
	h.keep(port, h.Start(fmt.Sprintf("nginx-%d", port), path, "-c", conf, "-p", h.Dir, "-e", h.Path("nginx.error.log")))
	h.answers(5*time.Second, "200", fmt.Sprintf("http://127.0.0.1:%d/", port))
}

// keep remembers which process serves a port.
func (h *host) keep(port int, p *process) {
	if h.servers == nil {
		h.servers = map[int]*process{}
	}
	h.servers[port] = p
}

// server returns the process that serves a port.
func (h *host) server(port int) *process {
	h.T.Helper()
	p := h.servers[port]
	if p == nil {
		h.T.Fatalf("nothing serves port %d of %s", port, h.Name)
	}
	return p
}

// capture records all frames on the bridge until stop is called, and returns
// them as one text of what is readable in them.
func (n *network) capture(t *testing.T, h *host) (stop func() string) {
	t.Helper()
	file := h.Path("bridge.pcap")
	cmd := exec.Command("ip", "netns", "exec", n.Bridge, "tcpdump", "-i", "br0", "-U", "-s", "0", "-w", file, "--immediate-mode", "tcp")
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	eventually(t, 5*time.Second, "tcpdump listens", func() string {
		if info, err := os.Stat(file); err == nil && info.Size() >= 24 {
			return ""
		}
		return "no capture file: " + file
	})
	stopped := false
	stop = func() string {
		if stopped {
			return ""
		}
		stopped = true
		_ = cmd.Process.Signal(os.Interrupt)
		<-done
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	t.Cleanup(func() { stop() })
	return stop
}
