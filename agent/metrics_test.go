package agent_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/agent"
)

// scrape returns what an address answers, and its status.
func scrape(ctx context.Context, t *testing.T, url string) (code int, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(data)
}

// until scrapes until all lines are there.
func until(ctx context.Context, t *testing.T, url string, lines ...string) string {
	t.Helper()
	for {
		code, body := scrape(ctx, t, url)
		missing := ""
		for _, line := range lines {
			if !strings.Contains("\n"+body, "\n"+line) {
				missing = line
			}
		}
		if code == http.StatusOK && missing == "" {
			return body
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s never had %q; it answers %d:\n%s", url, missing, code, body)
		}
	}
}

func TestMetricsOfTheHost(t *testing.T) {
	b := newBench(t)
	var contentType atomic.Value
	contentType.Store("text/plain; version=0.0.4; charset=utf-8")
	app := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer app.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", fmt.Sprint(contentType.Load()))
		_, _ = io.WriteString(w, "# TYPE mesh_requests_total counter\nmesh_requests_total 7") // no final newline
	}))
	defer proxy.Close()
	b.cfg.Metrics.Address = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	b.cfg.Proxy.Metrics = strings.TrimPrefix(proxy.URL, "http://")
	b.write("services.d/web.hcl", fmt.Sprintf(`service "web" {
  port = %d
  check "alive" {
    http     = "%s"
    interval = "1s"
    timeout  = "500ms"
  }
}`, freePort(t), app.URL))
	b.start()
	url := "http://" + b.cfg.Metrics.Address + "/metrics"
	body := until(b.deadline(), t, url,
		`mesh_agent_info{node="vm-a",version="devel"} 1`, "mesh_agent_joined 1", "mesh_agent_connected 1", "mesh_agent_policy_age_seconds ",
		"mesh_agent_registration_current 1", "mesh_agent_registration_refusals 0", "mesh_agent_definition_errors 0", "mesh_agent_plan_refused 0",
		`mesh_agent_certificate_expiry_timestamp_seconds{identity="spiffe://`, `mesh_agent_check_passing{check="alive",instance="web",service="default/web"} 1`,
		`mesh_agent_instance_health{health="passing",instance="web",service="default/web"} 1`, "mesh_agent_proxy_scrape_success 1",
		"mesh_requests_total 7\n", "mesh_agent_go_goroutines ", "mesh_agent_process_open_fds ")
	for line := range strings.Lines(body) {
		if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "mesh_agent_") && !strings.HasPrefix(line, "mesh_requests_total") {
			t.Errorf("%q could be a metric of the proxy's", line)
		}
	}

	// The same through the relay, which knows its own host.
	relay := url + "/node?target=192.0.2.1:7490&node="
	until(b.deadline(), t, relay+"vm-a", "mesh_agent_joined 1")
	for query, want := range map[string]int{"": http.StatusBadRequest, "?node=VM&target=127.0.0.1:1": http.StatusBadRequest, "?node=vm-b&target=127.0.0.1": http.StatusBadRequest, "?node=vm-b&target=" + b.cfg.Metrics.Address: http.StatusBadGateway} {
		if code, _ := scrape(t.Context(), t, url+"/node"+query); code != want {
			t.Errorf("/metrics/node%s answers %d, want %d", query, code, want)
		}
	}

	// What is no metrics, or not there, does not spoil the rest.
	b.write("services.d/web.hcl", "nonsense {")
	contentType.Store("text/html")
	until(b.deadline(), t, url, "mesh_agent_proxy_scrape_success 0", "mesh_agent_joined 1", "mesh_agent_definition_errors 1")
	proxy.Close()
	until(b.deadline(), t, url, "mesh_agent_proxy_scrape_success 0", "mesh_agent_joined 1")
	b.stop()
	until(b.deadline(), t, url, "mesh_agent_connected 0")
}

func TestMetricsAddressIsChecked(t *testing.T) {
	for address, want := range map[string]string{
		"127.0.0.1:7490": "", "[::1]:7490": "", "10.0.1.17:7490": "", "off": "", "": "",
		"0.0.0.0:7490": "one address of the host", "[::]:7490": "one address of the host", "localhost:7490": "IP:PORT", "7490": "IP:PORT",
		"127.0.0.1:0": "IP:PORT", "127.0.0.1:7491": "mesh-proxy serves its own there",
	} {
		err := agent.Config{NodeName: "vm-a", Metrics: agent.Metrics{Address: address}}.Validate()
		if got := fmt.Sprint(err); want == "" && err != nil || want != "" && !strings.Contains(got, want) {
			t.Errorf("metrics.address %q: %v, want %q", address, err, want)
		}
	}
}
