package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"runtime/pprof"
	"strings"
	"sync"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/flow"
)

// settings is what a support bundle tells of agent.hcl: these fields and no
// others, so that a secret which is added to Config one day stays out by itself.
type settings struct {
	Version     string   `json:"version"`
	Servers     []string `json:"servers"`
	NodeName    string   `json:"node_name"`
	Advertise   string   `json:"advertise,omitempty"`
	Zone        string   `json:"zone,omitempty"`
	DataDir     string   `json:"data_dir"`
	ServicesDir string   `json:"services_dir"`
	Socket      string   `json:"socket"`
	Group       string   `json:"group"`
	TokenFile   string   `json:"join_token_file"`
	Metrics     string   `json:"metrics_address"`
	Proxy       struct {
		Socket      string       `json:"socket"`
		ID          string       `json:"id"`
		User        string       `json:"user"`
		MeshAddress string       `json:"mesh_address,omitempty"`
		MeshPort    uint16       `json:"mesh_port"`
		AccessLog   string       `json:"access_log,omitempty"`
		Limits      proxy.Limits `json:"limits,omitzero"`
		Supervise   bool         `json:"supervise"`
		Binary      string       `json:"binary,omitempty"`
		StateDir    string       `json:"state_dir"`
		Metrics     string       `json:"metrics"`
	} `json:"proxy"`
}

func (c Config) settings() settings {
	s := settings{
		Version: c.Version, Servers: c.Servers, NodeName: c.NodeName, Advertise: c.Advertise, Zone: c.Zone, DataDir: c.DataDir,
		ServicesDir: c.ServicesDir, Socket: c.Socket, Group: c.Group, TokenFile: c.Join.TokenFile, Metrics: c.Metrics.Address,
	}
	s.Proxy.Socket, s.Proxy.ID, s.Proxy.User = c.Proxy.Socket, c.Proxy.ID, c.Proxy.User
	s.Proxy.MeshAddress, s.Proxy.MeshPort = c.Proxy.MeshAddress, c.Proxy.MeshPort
	s.Proxy.AccessLog, s.Proxy.Supervise, s.Proxy.Binary = c.Proxy.AccessLog, c.Proxy.Supervise, c.Proxy.Binary
	s.Proxy.Limits = c.Proxy.Limits
	s.Proxy.StateDir, s.Proxy.Metrics = c.Proxy.StateDir, c.Proxy.Metrics
	return s
}

// told is what a server has told about one topic.
type told struct {
	view.Topic
	Items map[string]json.RawMessage `json:"items"`
}

// debugRoutes show the parts of a support bundle that only the agent knows. Each
// is put together here from what is no secret; keys are in none of them.
func (a *Agent) debugRoutes(mux *http.ServeMux) {
	part := func(name string, show func(h *host, w http.ResponseWriter, r *http.Request)) {
		mux.HandleFunc("GET /v1/agent/debug/"+name, func(w http.ResponseWriter, r *http.Request) {
			h := a.running.Load()
			if h == nil {
				reply(w, http.StatusServiceUnavailable, apiError{Error: "the agent is stopping"})
				return
			}
			show(h, w, r)
		})
	}
	part("config", func(_ *host, w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, a.cfg.settings()) })
	part("plan", func(h *host, w http.ResponseWriter, _ *http.Request) {
		h.mu.Lock()
		config := h.planned.config
		h.mu.Unlock()
		reply(w, http.StatusOK, config)
	})
	part("view", func(h *host, w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, h.told()) })
	part("goroutines", func(_ *host, w http.ResponseWriter, _ *http.Request) { profile(w, "goroutine", 2) })
	part("heap", func(_ *host, w http.ResponseWriter, _ *http.Request) { profile(w, "heap", 0) })
	part("proxy-goroutines", func(h *host, w http.ResponseWriter, r *http.Request) {
		text, err := h.proxyStacks(r.Context())
		if err != nil {
			refuse(w, err)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, text) // the client is gone: nobody to tell
	})
	scrape := sync.OnceValues(func() (http.Handler, error) { return a.running.Load().scrape() })
	part("metrics", func(_ *host, w http.ResponseWriter, r *http.Request) {
		handler, err := scrape()
		if err != nil {
			reply(w, http.StatusInternalServerError, apiError{Error: err.Error()})
			return
		}
		handler.ServeHTTP(w, r)
	})
}

// profile writes one of the runtime's: stacks with addresses, and no contents of
// memory.
func profile(w http.ResponseWriter, name string, form int) {
	w.Header().Set("Content-Type", "application/octet-stream")
	_ = pprof.Lookup(name).WriteTo(w, form) // the client is gone: nobody to tell
}

// proxyStacks asks the attached proxies what their goroutines do.
func (h *host) proxyStacks(ctx context.Context) (string, error) {
	if len(h.feed.Status()) == 0 {
		return "", errNoProxy
	}
	ctx, cancel := context.WithTimeout(ctx, watchPatience)
	defer cancel()
	var mu sync.Mutex
	var text strings.Builder
	var problem error
	err := h.feed.Ask(ctx, flow.Query{Want: flow.Stacks}, func(a flow.Answer) {
		mu.Lock()
		defer mu.Unlock()
		text.WriteString(a.Stacks)
		if a.Error != "" {
			problem = errors.New(a.Error)
		}
	})
	mu.Lock()
	defer mu.Unlock()
	if text.Len() > 0 {
		return text.String(), nil
	}
	return "", cmp.Or(errors.Join(err, problem, ctx.Err()), errProxyLate)
}

// told is what the servers have told this host, by topic.
func (h *host) told() []told {
	snapshot := h.view.Snapshot()
	all := []told{}
	for _, topic := range h.topics() {
		one := told{Topic: topic, Items: map[string]json.RawMessage{}}
		for key, value := range snapshot.Items(topic) {
			if !json.Valid(value) {
				value, _ = json.Marshal(string(value)) // strings always can be
			}
			one.Items[key] = value
		}
		all = append(all, one)
	}
	return all
}
