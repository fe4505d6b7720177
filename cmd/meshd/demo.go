package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
)

// The demo's ports, all on the loopback address.
const (
	demoAPIPort = 8480 // where the demo's api listens
	demoWebPort = 9480 // where web finds api
)

const demoDefinitions = `# The demo's two services. Edit this file while the mesh runs.
service "web" {
  upstream "api" { local_port = %d }
}
service "api" {
  port     = %d
  protocol = "http"
  check "alive" {
    http     = "http://127.0.0.1:%d/healthz"
    interval = "1s"
    timeout  = "500ms"
  }
}
`

// demo is two small applications, web and api, and a view of what passes
// between them.
type demo struct {
	out  io.Writer
	api  *client.Client
	last string
	same int
}

func writeDemo(servicesDir string) error {
	text := fmt.Sprintf(demoDefinitions, demoWebPort, demoAPIPort, demoAPIPort)
	return os.WriteFile(filepath.Join(servicesDir, "demo.hcl"), []byte(text), 0o600)
}

func (d *demo) say(format string, args ...any) {
	_, _ = fmt.Fprintf(d.out, time.Now().Format("15:04:05  ")+format+"\n", args...)
}

// run serves api, and lets web call it once a second, until ctx ends. After
// three refusals it allows the call, as an operator would.
func (d *demo) run(ctx context.Context) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", demoAPIPort))
	if err != nil {
		return fmt.Errorf("the demo's api: %w", err)
	}
	server := &http.Server{Handler: http.HandlerFunc(answer), ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for refused := 0; ; {
		select {
		case <-ctx.Done():
			err := server.Close()
			<-served //nolint:errcheck // it says that the server is closed, as was just done
			return err
		case err := <-served:
			return fmt.Errorf("the demo's api: %w", err)
		case <-tick.C:
		}
		if !d.call(ctx) {
			continue
		}
		if refused++; refused == 3 {
			if err := d.allow(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// answer is the whole of the demo's api: it says who called.
func answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = fmt.Fprintf(w, "api was called by %s\n", r.Header.Get("X-Forwarded-Client-Cert")) //nolint:gosec // plain text, for a terminal
}

// call is what the demo's web does; it reports whether policy refused it.
func (d *demo) call(ctx context.Context) (denied bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/hello", demoWebPort), nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		if ctx.Err() == nil {
			d.show("web → api  GET /hello  no answer: " + errors.Unwrap(err).Error())
		}
		return false
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err != nil {
		return false
	}
	if reason := resp.Header.Get("Mesh-Error"); reason != "" {
		d.show(fmt.Sprintf("web → api  GET /hello  %d  mesh-error: %s", resp.StatusCode, reason))
		return reason == "denied"
	}
	d.show(fmt.Sprintf("web → api  GET /hello  %d  %s", resp.StatusCode, firstLine(body)))
	return false
}

func firstLine(b []byte) string {
	for i, c := range b {
		if c == '\n' {
			return string(b[:i])
		}
	}
	return string(b)
}

// show prints what is new, and now and then that nothing is.
func (d *demo) show(line string) {
	if line != d.last {
		d.last, d.same = line, 0
		d.say("%s", line)
		return
	}
	if d.same++; d.same%30 == 0 {
		d.say("%s  (the same %d times)", line, d.same)
	}
}

// allow does what "meshctl intention allow web api" does.
func (d *demo) allow(ctx context.Context) error {
	d.say("$ meshctl intention allow web api")
	spec, err := json.Marshal(intentions.Intention{Source: "web", Destination: "api", Action: intentions.Allow, Reason: "the demo"})
	if err != nil {
		return err
	}
	result, err := d.api.Apply(ctx, client.ApplyRequest{Resources: []client.Resource{{Kind: client.KindIntention, Spec: spec}}})
	if err != nil {
		return fmt.Errorf("the demo's intention: %w", err)
	}
	for _, c := range result.Changes {
		d.say("%s %s: %s, revision %d", c.Kind, c.Name, c.Change, c.Revision)
	}
	return nil
}
