package e2e_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// observability is the folder of what is shipped for Prometheus and Grafana.
const observability = "../../docs/observability"

// shipped returns a file of it, with values of this test in place of the example's.
func shipped(t *testing.T, name string, replace ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(observability, name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			t.Fatalf("%s lacks %q", name, replace[i])
		}
		text = strings.ReplaceAll(text, replace[i], replace[i+1])
	}
	return text
}

// expressions returns every query of the dashboard, its variables replaced.
func expressions(t *testing.T) []string {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
		Templating struct {
			List []struct {
				Name  string `json:"name"`
				Query any    `json:"query"`
			} `json:"list"`
		} `json:"templating"`
	}
	if err := json.Unmarshal([]byte(shipped(t, "dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	values := strings.NewReplacer("$__rate_interval", "1m", "$source", ".*", "$destination", ".*")
	var all []string
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			all = append(all, values.Replace(target.Expr))
		}
	}
	if len(all) < 15 || len(dashboard.Templating.List) != 3 {
		t.Fatalf("the dashboard has %d queries and %d variables", len(all), len(dashboard.Templating.List))
	}
	return all
}

// prometheus asks a host's Prometheus and returns the data of its answer.
func (h *host) prometheus(path, query string, into any) string {
	h.T.Helper()
	status, _, body := h.curl("-G", "http://127.0.0.1:9090/api/v1/"+path, "--data-urlencode", "query="+query)
	var answer struct {
		Status string          `json:"status"`
		Error  string          `json:"error"`
		Data   json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Status != "success" {
		return fmt.Sprintf("%s %q: %s %s %v", path, query, status, answer.Error, err)
	}
	if err := json.Unmarshal(answer.Data, into); err != nil {
		return err.Error()
	}
	return ""
}

// vector is the result of a query at one moment.
type vector struct {
	Result []struct {
		Metric map[string]string `json:"metric"`
		Value  []any             `json:"value"`
	} `json:"result"`
}

// Every metric that the rules and the dashboard use exists at a real Prometheus,
// which finds the hosts at the server and scrapes them as the documentation says.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.meshctl(0, "intention", "allow", "web", "api", "--http", "GET /hello", "--wait")
	s.meshctl(0, "intention", "allow", "web", "echo", "--wait")
	s.web.answers(5*time.Second, "200", "http://127.0.0.1:9191/hello")
	s.web.answers(time.Second, "403", "http://127.0.0.1:9191/other")
	stream := s.web.connect("127.0.0.1:9192")
	exchange(t, stream, "hello")
	s.meshctl(0, "intention", "deny", "web", "echo", "--replace", "--wait") // cuts it
	stranger := s.web.connect(s.api.Address + ":7443")
	if _, err := io.WriteString(stranger, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}

	// Another host gets nothing without a certificate of the mesh.
	if status, _, body := s.web.curl("-k", "https://"+s.api.Address+":7490/metrics"); status == "200" {
		t.Errorf("metrics were given to a stranger: %.200s", body)
	}
	if status, _, _ := s.web.curl("http://" + s.api.Address + ":7491/metrics"); status == "200" {
		t.Error("mesh-proxy's own metrics can be had from another host")
	}

	w := s.web.host
	w.Write(adminToken, 0o600, "mesh.token")
	w.Write(s.meshctl(0, "ca", "roots").Stdout, 0o644, "mesh-roots.pem")
	rules := w.Write(shipped(t, "alerts.yml"), 0o644, "alerts.yml")
	config := w.Write(shipped(t, "prometheus.yml", "mesh.example.com:7400", s.server.Address+":7400", "/etc/prometheus/", w.Dir+"/",
		"scrape_interval: 15s", "scrape_interval: 1s", "evaluation_interval: 15s", "evaluation_interval: 1s", "refresh_interval: 30s", "refresh_interval: 1s"), 0o644, "prometheus.yml")
	for _, args := range [][]string{{"check", "config", config}, {"check", "rules", rules}} {
		if r := w.Run("promtool", args...); r.Code != 0 {
			t.Fatalf("promtool %v: %s%s", args, r.Stdout, r.Stderr)
		}
	}
	w.Start("prometheus", "prometheus", "--config.file", config, "--storage.tsdb.path", w.Path("tsdb"), "--web.listen-address", "127.0.0.1:9090")
	eventually(t, 30*time.Second, "both hosts are scraped", func() string {
		var up vector
		if problem := w.prometheus("query", `up{job="mesh"} == 1`, &up); problem != "" {
			return problem
		}
		var instances []string
		for _, r := range up.Result {
			instances = append(instances, r.Metric["instance"]+"/"+r.Metric["node"])
		}
		slices.Sort(instances)
		if !slices.Equal(instances, []string{"vm-a/vm-a", "vm-b/vm-b"}) {
			var targets any
			return fmt.Sprint(instances, w.prometheus("targets", "", &targets), targets)
		}
		return ""
	})
	queries := expressions(t)
	names := regexp.MustCompile(`\b(?:mesh|process)_[a-z_]+\b`).FindAllString(strings.Join(queries, "\n")+shipped(t, "alerts.yml"), -1)
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) < 25 {
		t.Errorf("rules and dashboard name only %d metrics: %v", len(names), names)
	}
	for _, name := range names {
		var have vector
		eventually(t, 10*time.Second, "the metric "+name+" exists", func() string {
			if problem := w.prometheus("query", name, &have); problem != "" {
				return problem
			}
			if len(have.Result) == 0 {
				return "it has no series"
			}
			return ""
		})
	}
	for _, query := range queries {
		var have vector
		if problem := w.prometheus("query", query, &have); problem != "" {
			t.Errorf("the dashboard asks %s", problem)
		}
	}
	if r := w.Run("sh", "-c", "curl -s http://127.0.0.1:7490/metrics | promtool check metrics"); strings.Contains(r.Stderr, "parse error") || strings.Contains(r.Stderr, "error while linting") {
		t.Errorf("the metrics of vm-a: %s", r.Stderr)
	}
	s.alerts(w)
}

// alerts demands that every rule is evaluated without an error, and that a proxy
// that is gone raises the alarm of its host alone.
func (s *spine) alerts(w *host) {
	s.t.Helper()
	s.api.proxy.Kill(9)
	eventually(s.t, 20*time.Second, "the rule of a proxy that is down finds vm-b", func() string {
		var groups struct {
			Groups []struct {
				Rules []struct {
					Name      string `json:"name"`
					Health    string `json:"health"`
					LastError string `json:"lastError"`
					Alerts    []struct {
						Labels map[string]string `json:"labels"`
					} `json:"alerts"`
				} `json:"rules"`
			} `json:"groups"`
		}
		if problem := w.prometheus("rules", "", &groups); problem != "" {
			return problem
		}
		var found []string
		rules := 0
		for _, g := range groups.Groups {
			for _, r := range g.Rules {
				rules++
				if r.Health != "ok" {
					return fmt.Sprintf("rule %s is %s: %s", r.Name, r.Health, r.LastError)
				}
				for _, a := range r.Alerts {
					if r.Name == "MeshProxyDown" {
						found = append(found, a.Labels["instance"])
					}
				}
			}
		}
		slices.Sort(found)
		if rules < 15 || !slices.Equal(slices.Compact(found), []string{"vm-b"}) {
			return fmt.Sprintf("%d rules; MeshProxyDown: %v", rules, found)
		}
		return ""
	})
}
