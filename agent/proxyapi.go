package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/meshd/meshd/proxy/feed"
)

// restartPatience is how long a proxy may take to be replaced: it gives up itself before that.
const restartPatience = 60 * time.Second

// Restarted is the answer of POST /v1/agent/proxies/{id}/restart.
type Restarted struct {
	Proxy string `json:"proxy"`
	// PID is the process that serves now.
	PID int `json:"pid"`
}

// restartProxy has a proxy of this host start its program anew, and hand over.
func (a *Agent) restartProxy(w http.ResponseWriter, r *http.Request) {
	if may, _ := r.Context().Value(ownerKey{}).(bool); !may {
		reply(w, http.StatusForbidden, apiError{Error: "only root and the agent's own user may restart a proxy"})
		return
	}
	h := a.running.Load()
	if h == nil {
		reply(w, http.StatusServiceUnavailable, apiError{Error: errStopping.Error()})
		return
	}
	// The server's limits are for requests that are answered at once.
	flow := http.NewResponseController(w)
	if err := errors.Join(flow.SetReadDeadline(time.Time{}), flow.SetWriteDeadline(time.Now().Add(restartPatience+time.Second))); err != nil {
		reply(w, http.StatusInternalServerError, apiError{Error: err.Error()})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), restartPatience)
	defer cancel()
	id := r.PathValue("id")
	pid, err := h.feed.Restart(ctx, id)
	if err != nil {
		reply(w, restartCode(err), apiError{Error: err.Error()})
		return
	}
	h.log.InfoContext(r.Context(), "proxy was restarted on request", slog.String("proxy", id), slog.Int("pid", pid))
	reply(w, http.StatusOK, Restarted{Proxy: id, PID: pid})
}

// restartCode is the status of a restart that was not done.
func restartCode(err error) int {
	switch {
	case errors.Is(err, feed.ErrNoProxy):
		return http.StatusNotFound
	case errors.Is(err, feed.ErrNoRestart), errors.Is(err, feed.ErrRestart):
		return http.StatusConflict
	default:
		return http.StatusServiceUnavailable
	}
}
