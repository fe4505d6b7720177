package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hosts gives a host names of its own: what ip netns exec shows its programs as
// /etc/hosts. It is written in place, so that those that run see the change.
func (h *host) hosts(lines string) {
	h.t.Helper()
	dir := filepath.Join("/etc/netns", h.ns)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	f, err := os.OpenFile(filepath.Join(dir, "hosts"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // a write that fails is seen below
	if _, err := f.WriteString("127.0.0.1 localhost\n" + lines); err != nil {
		h.t.Fatal(err)
	}
}

// TestOutside: a service stands for machines that are not in the mesh, by their
// name. The caller has no way to them but through the host that does.
func TestOutside(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	shop, egress := c.join("vm-a", "shop"), c.prepare("vm-egress")
	outside := []*host{c.net.host(t, "db1"), c.net.host(t, "db2")}
	names := ""
	for _, o := range outside {
		names += o.addr + " orders.example.com\n"
		o.write(o.name+"\n", 0o644, "www", "v1", "orders")
		o.serve(8080, python, "-m", "http.server", "--directory", o.path("www"), "8080")
		ip(t, "-n", shop.ns, "route", "add", "blackhole", o.addr+"/32")
	}
	egress.hosts(names)
	egress.write(c.token("vm-egress", "orders"), 0o600, "join.token")
	egress.startAgent()
	egress.startProxy()
	shop.define("shop.hcl", "service \"shop\" {\n  upstream \"orders\" { local_port = 9191 }\n}\n")
	egress.define("orders.hcl", "service \"orders\" {\n  external = \"orders.example.com\"\n  port     = 8080\n  protocol = \"http\"\n"+
		"  check \"reachable\" {\n    tcp      = \"orders.example.com:8080\"\n    interval = \"1s\"\n  }\n}\n")
	const url = "http://127.0.0.1:9191/v1/orders"
	shop.answers(20*time.Second, "403", url)
	c.meshctl(0, "intention", "allow", "shop", "orders", "--http", "GET /v1/*", "--wait")
	shop.answers(10*time.Second, "200", url)
	if r := c.meshctl(0, "instances", "orders"); !strings.Contains(r.stdout, egress.addr+":7443 → orders.example.com") {
		t.Errorf("instances:\n%s", r.stdout)
	}
	if status, _, _ := shop.curl("http://" + outside[0].addr + ":8080/v1/orders"); !strings.HasPrefix(status, "curl exit") {
		t.Fatalf("around the mesh: %s", status)
	}

	// Whichever of the two answers now: when it dies, the other one does.
	_, _, first := shop.curl(url)
	other := outside[0]
	for _, o := range outside {
		if first == o.name+"\n" {
			o.server(8080).kill(syscall.SIGKILL)
			continue
		}
		other = o
	}
	for i := range 5 {
		if status, _, body := shop.curl(url); status != "200" || body != other.name+"\n" {
			t.Errorf("request %d: %s %q, want %s", i, status, body, other.name)
		}
	}

	// The name leads to a third machine: new connections go there.
	third := c.net.host(t, "db3")
	third.write("db3\n", 0o644, "www", "v1", "orders")
	third.serve(8080, python, "-m", "http.server", "--directory", third.path("www"), "8080")
	egress.hosts(fmt.Sprintf("%s orders.example.com\n", third.addr))
	eventually(t, 30*time.Second, "the third one answers", func() string {
		other.server(8080).kill(syscall.SIGKILL)
		status, headers, body := shop.curl(url)
		if status == "200" && body == "db3\n" {
			return ""
		}
		return fmt.Sprintf("%s %q (mesh-error %q)", status, body, headers["mesh-error"])
	})

	// Nobody is there: callers are told so.
	third.server(8080).kill(syscall.SIGKILL)
	shop.answers(10*time.Second, "503", url)
	eventually(t, 10*time.Second, "the check finds it", func() string {
		r := c.server.run("meshctl", "--addr", c.admin(), "check", "--node", "vm-egress")
		if r.code == 3 && strings.Contains(r.stdout, "orders is critical; check reachable: TCP connect orders.example.com:8080: ") {
			return ""
		}
		return r.stdout + r.stderr
	})
}
