package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	strict "github.com/go-json-experiment/json"

	"github.com/meshd/meshd/agent/check"
	"github.com/meshd/meshd/agent/leaf"
	"github.com/meshd/meshd/agent/plan"
	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

const (
	// maxReport bounds the body of a request.
	maxReport = 64 << 10
	// lastAnswers is how long requests may take to end when the agent does.
	lastAnswers = time.Second
)

// Status is the answer of GET /v1/agent/status: all that the agent knows of its
// host, for diagnosis without a server.
type Status struct {
	Node        string    `json:"node"`
	TrustDomain string    `json:"trust_domain,omitempty"` // empty: not joined
	Version     string    `json:"version,omitempty"`
	Session     string    `json:"session"`
	Started     time.Time `json:"started"`
	Now         time.Time `json:"now"`
	JoinError   string    `json:"join_error,omitempty"`
	Address     string    `json:"address,omitempty"` // of the mesh port
	// Server is the connection to the servers.
	Server view.Status `json:"server"`
	// PolicyAge is how many seconds ago a server confirmed that this host has
	// the newest policy; null: never.
	PolicyAge *float64 `json:"policy_age_seconds"`
	// Plan is the position of the newest plan, PlanRefused why it is not in
	// force, Problems what was left out of it.
	Plan         catalog.Position    `json:"plan"`
	PlanRefused  string              `json:"plan_refused,omitempty"`
	Problems     []plan.Problem      `json:"problems,omitempty"`
	Instances    []Instance          `json:"instances"`
	Registration registry.SyncStatus `json:"registration"`
	Leaves       []leaf.Status       `json:"leaves"`
	Proxies      []feed.ProxyStatus  `json:"proxies"`
	Listeners    []ListenerStatus    `json:"listeners"`
	// Denied are the upstreams that no intention lets a service of this host call.
	Denied []DeniedUpstream `json:"denied,omitempty"`
	Files  []registry.File  `json:"files"`
	// FolderError is why the folder of definitions can't be read.
	FolderError string `json:"folder_error,omitempty"`
	// Findings are what an operator should change on this host.
	Findings []string `json:"findings,omitempty"`
}

// Instance is one instance of this host.
type Instance struct {
	Service  string                   `json:"service"` // namespace/name
	ID       string                   `json:"id"`
	Identity spiffe.ID                `json:"identity,omitzero"`
	Address  string                   `json:"address"`
	Ports    []catalog.DefinitionPort `json:"ports,omitempty"`
	Health   catalog.Health           `json:"health"`
	Checks   []check.State            `json:"checks,omitempty"`
}

// DeniedUpstream is an upstream that may not be called.
type DeniedUpstream struct {
	Source      spiffe.ID `json:"source"`
	Destination spiffe.ID `json:"destination"`
	Reason      string    `json:"reason"`
}

// deniedIn lists what a plan's upstreams may not call, each pair once.
func deniedIn(config proxy.Config) []DeniedUpstream {
	var out []DeniedUpstream
	for _, l := range config.Listeners {
		for _, c := range config.Clusters {
			if l.Kind != proxy.ListenUpstream || c.Name != l.Cluster || c.Denied == "" {
				continue
			}
			one := DeniedUpstream{Source: l.Source, Destination: c.Service, Reason: c.Denied}
			if !slices.Contains(out, one) {
				out = append(out, one)
			}
		}
	}
	return out
}

// CheckReport is the body of PUT /v1/agent/checks/{instance}/{check}. The
// instance is SERVICE/ID, NAMESPACE/SERVICE/ID, or the ID alone where only one
// instance has it, with "/" written as %2F.
type CheckReport struct {
	Status catalog.Health `json:"status"`
	Output string         `json:"output,omitempty"`
}

// Left is the answer of POST /v1/agent/leave.
type Left struct {
	Node string `json:"node"`
	// Instances were those of the node.
	Instances int `json:"instances"`
}

// apiError is the body of every answer that is no success.
type apiError struct {
	Error string `json:"error"`
}

// serve answers on the local API's socket until ctx ends.
func (a *Agent) serve(ctx context.Context, l net.Listener, allowed access) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/agent/status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Status())
	})
	mux.HandleFunc("PUT /v1/agent/checks/{instance}/{check}", a.report)
	mux.HandleFunc("POST /v1/agent/leave", a.leaveNow)
	mux.HandleFunc("POST /v1/agent/proxies/{id}/restart", a.restartProxy)
	a.debugRoutes(mux)
	a.watchRoutes(ctx, mux)
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			cred, err := peerOf(c)
			return context.WithValue(ctx, ownerKey{}, err == nil && owner(cred))
		},
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		// Whoever made the node leave gets an answer.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAnswers)
		defer cancel()
		if srv.Shutdown(last) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(guarded{Listener: l, allow: allowed.api})
	if !stop() {
		<-closed
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("local API: %w", err)
	}
	return nil
}

func reply(w http.ResponseWriter, code int, body any) {
	data, err := json.Marshal(body)
	if err != nil {
		code, data = http.StatusInternalServerError, []byte(`{"error":"the answer can't be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(data, '\n')) // the client is gone: nobody to tell
}

// ownerKey is where the context of a request says whether the caller may do what
// the host's operator may, beyond looking and reporting.
type ownerKey struct{}

// leaveNow takes the node out of the mesh and ends the agent.
func (a *Agent) leaveNow(w http.ResponseWriter, r *http.Request) {
	if may, _ := r.Context().Value(ownerKey{}).(bool); !may {
		reply(w, http.StatusForbidden, apiError{Error: "only root and the agent's own user may make the node leave"})
		return
	}
	left := Left{Node: a.cfg.NodeName}
	if h := a.running.Load(); h != nil {
		left.Instances = len(h.registry.Definitions())
	}
	switch err := a.Leave(r.Context()); {
	case errors.Is(err, ErrNotConnected):
		reply(w, http.StatusServiceUnavailable, apiError{
			Error: err.Error() + "; nothing has changed: try again when a server is there, or stop the agent and run on a server: meshctl node leave " + left.Node,
		})
	case err != nil:
		reply(w, http.StatusInternalServerError, apiError{Error: err.Error()})
	default:
		reply(w, http.StatusOK, left)
	}
}

// report takes the result of a ttl check.
func (a *Agent) report(w http.ResponseWriter, r *http.Request) {
	h := a.running.Load()
	if h == nil {
		reply(w, http.StatusServiceUnavailable, apiError{Error: "the agent is stopping"})
		return
	}
	var body CheckReport
	if err := strict.UnmarshalRead(http.MaxBytesReader(w, r.Body, maxReport), &body, strict.RejectUnknownMembers(true)); err != nil {
		reply(w, http.StatusBadRequest, apiError{Error: `body: write {"status": "passing", "output": "…"}: ` + err.Error()})
		return
	}
	key, err := h.instance(r.PathValue("instance"))
	if err == nil {
		err = h.checks.Report(key, r.PathValue("check"), body.Status, body.Output)
	}
	if err != nil {
		reply(w, reportCode(err), apiError{Error: err.Error()})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// errInstance is wrapped when a name picks no instance, or several.
var errInstance = errors.New("no such instance on this host")

// reportCode is the status of a refused report.
func reportCode(err error) int {
	switch {
	case errors.Is(err, errInstance), errors.Is(err, check.ErrNoCheck):
		return http.StatusNotFound
	case errors.Is(err, check.ErrNotTTL):
		return http.StatusConflict
	default:
		return http.StatusBadRequest
	}
}

// instance finds the key of the instance that a name picks.
func (h *host) instance(name string) (string, error) {
	var found []string
	for _, d := range h.registry.Definitions() {
		short := d.Ref().Short() + "/" + d.InstanceID()
		if key := registry.Key(d); name == key || name == short || name == d.InstanceID() {
			found = append(found, key)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fmt.Errorf("instance %q: %w", name, errInstance)
	default:
		return "", fmt.Errorf("instance %q: %w of that name alone: write one of %s", name, errInstance, strings.Join(found, ", "))
	}
}

// Status returns what the agent knows of its host.
func (a *Agent) Status() Status {
	s := Status{Node: a.cfg.NodeName, Version: a.cfg.Version, Session: a.session, Started: a.started, Now: time.Now()}
	h := a.running.Load()
	if h == nil {
		return s
	}
	h.mu.Lock()
	s.JoinError, s.Address = h.joinError, h.address
	s.Plan, s.PlanRefused = h.planned.position, h.planned.refused
	s.Problems = slices.Clone(h.planned.problems)
	s.Denied = deniedIn(h.planned.config)
	h.mu.Unlock()
	s.Listeners = h.listeners()
	if identity := h.identity.Load(); identity != nil {
		s.TrustDomain = identity.TrustDomain
	}
	s.Server = h.view.Status()
	if age, ok := h.view.Age(); ok {
		seconds := age.Seconds()
		s.PolicyAge = &seconds
	}
	s.Registration, _ = h.syncer.Status()
	s.Leaves, s.Proxies = h.leaves.Status(), h.feed.Status()
	s.Files, s.FolderError = h.registry.Files()
	definitions := h.registry.Definitions()
	s.Instances = make([]Instance, 0, len(definitions))
	for _, d := range definitions {
		d = d.WithDefaults()
		i := Instance{
			Service: d.Ref().String(), ID: d.ID, Address: d.Host(), Ports: d.Ports,
			Health: h.health(registry.Key(d)).Health, Checks: h.checks.States(registry.Key(d)),
		}
		if s.TrustDomain != "" {
			i.Identity = spiffe.Service(s.TrustDomain, d.Namespace, d.Name)
		}
		s.Instances = append(s.Instances, i)
	}
	s.Findings = exposed(definitions, procnet.Listening())
	return s
}

// exposed tells which applications can be reached without the mesh: they listen
// on more than the loopback address that their definition names.
func exposed(definitions []catalog.Definition, sockets []procnet.Socket) []string {
	var found []string
	for _, d := range definitions {
		d = d.WithDefaults()
		local, err := netip.ParseAddr(d.Address)
		if err != nil || !local.IsLoopback() {
			continue
		}
		for _, p := range d.Ports {
			for _, l := range sockets {
				if l.Address.Port() != p.Port || l.Address.Addr().Unmap().IsLoopback() {
					continue
				}
				finding := fmt.Sprintf("%s also listens on %s, reachable without the mesh → bind %s",
					d.Ref().Short(), netip.AddrPortFrom(l.Address.Addr().Unmap(), l.Address.Port()), d.Address)
				if !slices.Contains(found, finding) {
					found = append(found, finding)
				}
			}
		}
	}
	return found
}
