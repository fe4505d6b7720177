package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/client"
)

const (
	// tapHeartbeat is how often a tap without news says that it lives.
	tapHeartbeat = 15 * time.Second
	// tapPatience is how long a reader may take to make room; then it is cut.
	tapPatience = 30 * time.Second
	// localDenials is how many denials are listed unless the caller says otherwise.
	localDenials = 100
)

// watchRoutes are those routes of a server's API that a host can answer by itself,
// of what its own proxies see. They need neither a token nor a living server. What
// streams ends with ctx.
func (a *Agent) watchRoutes(ctx context.Context, mux *http.ServeMux) {
	stream := func(want flow.Want) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			both, cancel := context.WithCancel(r.Context())
			defer cancel()
			stop := context.AfterFunc(ctx, cancel)
			defer stop()
			a.streamAnswers(both, w, r, want) //nolint:contextcheck // it is that of the request, ended by ctx, too
		}
	}
	mux.HandleFunc("GET /v1/tap", stream(flow.Records))
	mux.HandleFunc("GET /v1/top", stream(flow.Edges))
	mux.HandleFunc("GET /v1/denials", func(w http.ResponseWriter, r *http.Request) {
		q, err := flow.ParseQuery(flow.Denials, r.URL.Query())
		if q.Limit == 0 {
			q.Limit = localDenials
		}
		answer, err := a.collect(r.Context(), q, err)
		if err != nil {
			refuse(w, err)
			return
		}
		reply(w, http.StatusOK, answer)
	})
	mux.HandleFunc("GET /v1/explain/{id}", func(w http.ResponseWriter, r *http.Request) {
		q := flow.Query{Want: flow.Find, ID: r.PathValue("id")}
		answer, err := a.collect(r.Context(), q, nil)
		if err == nil && len(answer.Records) == 0 {
			err = client.UnknownID(q.ID, answer)
		}
		if err != nil {
			refuse(w, err)
			return
		}
		explained := client.Recount(client.Telling(answer.Records), a.trustDomain(), time.Now())
		explained.Records = answer.Records
		reply(w, http.StatusOK, explained)
	})
}

func (a *Agent) trustDomain() string {
	if h := a.running.Load(); h != nil {
		return h.trustDomain()
	}
	return ""
}

// ask is host.watch of the running agent.
func (a *Agent) ask(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	h := a.running.Load()
	if h == nil {
		return errStopping
	}
	if !q.Lasting() && len(h.feed.Status()) == 0 {
		return errNoProxy
	}
	return h.watch(ctx, q, emit)
}

var (
	errStopping = errors.New("the agent is stopping")
	errNoProxy  = errors.New("no mesh-proxy is attached to the agent")
)

// collect waits for the answer to a query that has an end.
func (a *Agent) collect(ctx context.Context, q flow.Query, err error) (flow.Answer, error) {
	all := flow.Answer{Records: []flow.Record{}, Hosts: 1}
	if err != nil {
		return all, err
	}
	err = a.ask(ctx, q, func(piece flow.Answer) error {
		all.Records = append(all.Records, piece.Records...)
		all.Kept, all.Caught = all.Kept.Worse(piece.Kept), all.Caught || piece.Caught
		return nil
	})
	return all, err
}

// refuse answers with an error, in the form of a server's API.
func refuse(w http.ResponseWriter, err error) {
	status, e := http.StatusServiceUnavailable, &client.Error{Code: client.CodeUnavailable, Message: err.Error(), Next: "meshctl check --local"}
	if known, ok := errors.AsType[*client.Error](err); ok {
		status, e = http.StatusNotFound, known
	} else if errors.Is(err, flow.ErrQuery) {
		status, e = http.StatusBadRequest, &client.Error{Code: client.CodeInvalid, Message: err.Error()}
	}
	reply(w, status, struct {
		Error *client.Error `json:"error"`
	}{e})
}

// streamAnswers sends what the proxies see as server-sent events, until the reader
// leaves or ctx ends.
func (a *Agent) streamAnswers(ctx context.Context, w http.ResponseWriter, r *http.Request, want flow.Want) {
	q, err := flow.ParseQuery(want, r.URL.Query())
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	e := &eventWriter{out: w, flow: http.NewResponseController(w)}
	// The server's limits are for requests that end.
	if e.flow.SetReadDeadline(time.Time{}) != nil || e.write(": welcome\n\n") != nil {
		return
	}
	pieces, ended := make(chan flow.Answer), make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() {
		ended <- a.ask(ctx, q, func(piece flow.Answer) error {
			select {
			case pieces <- piece:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	heartbeat := time.NewTicker(tapHeartbeat)
	defer heartbeat.Stop()
	for {
		select {
		case piece := <-pieces:
			err = e.event(client.EventAnswer, piece)
		case <-heartbeat.C:
			err = e.write(": alive\n\n")
		case failed := <-ended:
			if failed == nil {
				failed = errStopping
			}
			_ = e.event(client.EventError, &client.Error{Code: client.CodeUnavailable, Message: failed.Error()}) // it ends either way
			return
		}
		if err != nil {
			return
		}
	}
}

// eventWriter writes server-sent events (WHATWG HTML, section 9.2).
type eventWriter struct {
	out  http.ResponseWriter
	flow *http.ResponseController
}

func (e *eventWriter) event(name string, data any) error {
	body, err := json.Marshal(data)
	if err != nil {
		return err
	}
	return e.write("event: " + name + "\ndata: " + string(body) + "\n\n")
}

func (e *eventWriter) write(text string) error {
	if err := e.flow.SetWriteDeadline(time.Now().Add(tapPatience)); err != nil {
		return err
	}
	if _, err := e.out.Write([]byte(text)); err != nil {
		return err
	}
	return e.flow.Flush()
}
