package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/machines"
)

// hosts gives a host names of its own: what ip netns exec shows its programs as
// /etc/hosts. It is written in place, so that those that run see the change.
func (h *host) hosts(lines string) {
	h.T.Helper()
	dir := filepath.Join("/etc/netns", h.Namespace)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.T.Fatal(err)
	}
	h.T.Cleanup(func() { _ = os.RemoveAll(dir) })
	f, err := os.OpenFile(filepath.Join(dir, "hosts"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		h.T.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // a write that fails is seen below
	if _, err := f.WriteString("127.0.0.1 localhost\n" + lines); err != nil {
		h.T.Fatal(err)
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
		names += o.Address + " orders.example.com\n"
		o.Write(o.Name+"\n", 0o644, "www", "v1", "orders")
		o.serve(8080, python, "-m", "http.server", "--directory", o.Path("www"), "8080")
		machines.IP(t, "-n", shop.Namespace, "route", "add", "blackhole", o.Address+"/32")
	}
	egress.hosts(names)
	egress.Write(c.token("vm-egress", "orders"), 0o600, "join.token")
	egress.startAgent()
	egress.startProxy()
	shop.define("shop.hcl", "service \"shop\" {\n  upstream \"orders\" { local_port = 9191 }\n}\n")
	egress.define("orders.hcl", "service \"orders\" {\n  external = \"orders.example.com\"\n  port     = 8080\n  protocol = \"http\"\n"+
		"  check \"reachable\" {\n    tcp      = \"orders.example.com:8080\"\n    interval = \"1s\"\n  }\n}\n")
	const url = "http://127.0.0.1:9191/v1/orders"
	shop.answers(20*time.Second, "403", url)
	c.meshctl(0, "intention", "allow", "shop", "orders", "--http", "GET /v1/*", "--wait")
	shop.answers(10*time.Second, "200", url)
	if r := c.meshctl(0, "instances", "orders"); !strings.Contains(r.Stdout, egress.Address+":7443 → orders.example.com") {
		t.Errorf("instances:\n%s", r.Stdout)
	}
	if status, _, _ := shop.curl("http://" + outside[0].Address + ":8080/v1/orders"); !strings.HasPrefix(status, "curl exit") {
		t.Fatalf("around the mesh: %s", status)
	}

	// Whichever of the two answers now: when it dies, the other one does.
	_, _, first := shop.curl(url)
	other := outside[0]
	for _, o := range outside {
		if first == o.Name+"\n" {
			o.server(8080).Kill(syscall.SIGKILL)
			continue
		}
		other = o
	}
	for i := range 5 {
		if status, _, body := shop.curl(url); status != "200" || body != other.Name+"\n" {
			t.Errorf("request %d: %s %q, want %s", i, status, body, other.Name)
		}
	}

	// The name leads to a third machine: new connections go there.
	third := c.net.host(t, "db3")
	third.Write("db3\n", 0o644, "www", "v1", "orders")
	third.serve(8080, python, "-m", "http.server", "--directory", third.Path("www"), "8080")
	egress.hosts(fmt.Sprintf("%s orders.example.com\n", third.Address))
	eventually(t, 30*time.Second, "the third one answers", func() string {
		other.server(8080).Kill(syscall.SIGKILL)
		status, headers, body := shop.curl(url)
		if status == "200" && body == "db3\n" {
			return ""
		}
		return fmt.Sprintf("%s %q (mesh-error %q)", status, body, headers["mesh-error"])
	})

	// Nobody is there: callers are told so.
	third.server(8080).Kill(syscall.SIGKILL)
	shop.answers(10*time.Second, "503", url)
	eventually(t, 10*time.Second, "the check finds it", func() string {
		r := c.server.Run("meshctl", "--addr", c.admin(), "check", "--node", "vm-egress")
		if r.Code == 3 && strings.Contains(r.Stdout, "orders is critical; check reachable: TCP connect orders.example.com:8080: ") {
			return ""
		}
		return r.Stdout + r.Stderr
	})
}
