package cluster

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshd/meshd/tests/fault/canary"
)

// inputs are the files that hold secrets because the operator put them there.
var inputs = map[string]string{ //nolint:gochecknoglobals // never changed
	"bootstrap.token": "the operator's token", "cluster.key": "the cluster's key", "join.token": "a join token",
}

// sweep looks for the cluster's secrets in all that its programs have left, and in
// the metrics of the servers that still run. An agent and its proxy keep the private
// keys of their own host. It runs after each test.
func (c *Cluster) sweep() {
	for i, f := range c.Sweep() {
		if i < 10 {
			c.t.Errorf("a secret is where none may be: %s", f)
		}
	}
}

// Sweep is what New does when the test ends.
func (c *Cluster) Sweep() []canary.Find {
	c.t.Helper()
	root := filepath.Dir(filepath.Dir(c.Servers[0].Dir)) // of all folders of the test
	tokens, err := canary.New(secrets(root)...)
	if err != nil {
		c.t.Fatal(err)
	}
	keys, err := canary.New(canary.PrivateKeys()...)
	if err != nil {
		c.t.Fatal(err)
	}
	finds, err := tokens.Tree(root, func(path string) bool { return inputs[filepath.Base(path)] != "" })
	if err != nil {
		c.t.Fatal(err)
	}
	more, err := keys.Tree(root, func(path string) bool {
		return inputs[filepath.Base(path)] != "" || strings.Contains(path, "/agent/") || strings.Contains(path, "/proxy/")
	})
	if err != nil {
		c.t.Fatal(err)
	}
	finds = append(finds, more...)
	for _, s := range c.Servers {
		for _, look := range []*canary.Searcher{tokens, keys} {
			if f, err := s.searchMetrics(look); err == nil { // else it does not run
				finds = append(finds, f...)
			}
		}
	}
	return finds
}

// secrets reads what the operator has given to the hosts under a folder.
func secrets(root string) []canary.Secret {
	var out []canary.Secret
	seen := map[string]bool{}
	for file, name := range inputs {
		paths, _ := filepath.Glob(filepath.Join(root, "*", "*", file)) // the pattern is right
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil || seen[string(text)] {
				continue
			}
			seen[string(text)] = true
			out = append(out, canary.Secret{Name: name, Value: text})
			encoded, is := strings.CutPrefix(strings.TrimSpace(string(text)), "meshkey1.")
			if raw, err := base64.RawURLEncoding.DecodeString(encoded); is && err == nil && len(raw) > 32 {
				out = append(out, canary.Secret{Name: name, Value: raw[:32]}) // a checksum follows
			}
		}
	}
	return out
}

// searchMetrics looks into what the server tells Prometheus.
func (s *Server) searchMetrics(look *canary.Searcher) ([]canary.Find, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.Path("server.sock"))
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://meshd/v1/metrics", nil)
	if err != nil {
		return nil, fmt.Errorf("ask for metrics: %w", err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask for metrics: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	return look.Reader("the metrics of "+s.Name, resp.Body)
}
