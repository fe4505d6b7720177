package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/proxy/balance"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// headers lets intentions look at a request's fields.
type headers http1.Fields

// HeaderValue implements intentions.HeaderLookup.
func (h *headers) HeaderValue(name string, i int) ([]byte, bool) {
	for f := range *h {
		if field := &(*h)[f]; equalFold(field.Name, name) {
			if i == 0 {
				return field.Value, true
			}
			i--
		}
	}
	return nil, false
}

// equalFold compares ASCII; lower is in lower case already.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// ingress answers the requests of other proxies: the local application does, if the policy allows.
type ingress struct{ p *Plane }

// Handle implements l7.Handler.
func (h ingress) Handle(ex *l7.Exchange) l7.Response {
	l, ok := ex.Conn.User.(*link)
	if !ok {
		return ex.Fail(&l7.Error{Reason: l7.Internal, Err: errNoLink})
	}
	l.begin(ex)
	ex.Record.User, ex.Record.Rule = l, -1
	in := h.p.current().inbounds[l.name]
	if in == nil {
		return l.attempt.fail(ex, &l7.Error{Reason: l7.NoRoute, Err: errUnknownName})
	}
	ex.Record.Destination, ex.Record.Endpoint = in.destination, in.Instance
	d := l.decide(in, time.Now())
	ex.Record.Rule = d.Rule
	h.p.decided(context.Background(), l, in.destination, d)
	if !d.Allowed {
		return l.attempt.fail(ex, &l7.Error{Reason: l7.Denied, Detail: string(d.Reason)})
	}
	return l.attempt.local(ex, in)
}

// egress sends the requests of a local application to the mesh.
type egress struct{ p *Plane }

var errNoLink = errors.New("the connection is not in the table")

// Handle implements l7.Handler.
func (h egress) Handle(ex *l7.Exchange) l7.Response {
	l, ok := ex.Conn.User.(*link)
	if !ok {
		return ex.Fail(&l7.Error{Reason: l7.Internal, Err: errNoLink})
	}
	l.begin(ex)
	ex.Record.User, ex.Record.Rule = l, -1
	route := h.p.current().upstreams[l.listener]
	if route == nil || !route.http && !route.auto || route.source != ex.Conn.Source {
		// The listener became another one: the connection must, too.
		l.drain()
		return l.attempt.fail(ex, &l7.Error{Reason: l7.NoRoute, Detail: "the upstream was changed; connect again"})
	}
	ex.Record.Destination = route.destination
	if l.destination != route.destination { // the listener leads elsewhere since this connection was accepted
		l.lead(route)
	}
	if route.cluster.Denied != "" {
		return l.attempt.fail(ex, &l7.Error{Reason: l7.Denied, Detail: route.cluster.Denied})
	}
	if l.cluster != route.cluster.Name { // it was refused until now
		l.lead(route)
	}
	return l.attempt.remote(ex, route)
}

// attempt is the response to the exchange that runs on a link. For the mesh it forwards to one endpoint after another while
// none could be connected to, which is safe: nothing was sent.
type attempt struct {
	link  *link
	ex    *l7.Exchange
	route *upstreamRoute // nil towards a local application
	tried [maxAttempts]int
	n     int
	state *balance.State
	load  *load // of the cluster, where this request counts; nil if it does not
	app   bool  // it is the application that answers

	// mu guards inner, which Cancel may ask for from any goroutine.
	mu       sync.Mutex
	inner    l7.Response
	canceled l7.Reason
}

// fail answers with an error of our own.
func (a *attempt) fail(ex *l7.Exchange, err *l7.Error) l7.Response {
	a.reset(ex, nil)
	a.set(ex.Fail(err))
	return a
}

// local forwards to the application.
func (a *attempt) local(ex *l7.Exchange, in *inboundRoute) l7.Response {
	a.reset(ex, nil)
	a.app = true
	if in.outside != nil {
		in.outside.prepare(&ex.Request)
	}
	a.set(in.app.Forward(ex))
	return a
}

// remote forwards to an endpoint of the route.
func (a *attempt) remote(ex *l7.Exchange, route *upstreamRoute) l7.Response {
	a.reset(ex, route)
	if over := route.budget.takeRequest(); over != "" {
		a.route = nil
		a.set(a.overflow(route, over))
		return a
	}
	a.load = route.budget.load
	if !a.next() {
		a.set(ex.Fail(&l7.Error{Reason: l7.NoHealthyInstance, Err: errNoEndpoint}))
	}
	return a
}

func (a *attempt) reset(ex *l7.Exchange, route *upstreamRoute) {
	a.mu.Lock()
	a.ex, a.route, a.n, a.state, a.inner, a.canceled, a.app = ex, route, 0, nil, nil, l7.None, false
	a.mu.Unlock()
}

func (a *attempt) set(r l7.Response) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inner = r
	if a.canceled != l7.None {
		r.Cancel(a.canceled)
	}
}

// next forwards to the next endpoint, and reports false if none is left to try.
func (a *attempt) next() bool {
	if a.n >= a.link.plane.limits.Attempts {
		return false
	}
	i := a.route.picker.Pick(a.tried[:a.n])
	if i < 0 {
		return false
	}
	a.tried[a.n] = i
	a.n++
	a.state = a.route.states[i]
	a.state.Begin()
	a.link.plane.health.picked(a.route, a.state)
	a.ex.Record.Endpoint = a.route.endpoints[i].instance
	a.set(a.route.endpoints[i].pool.Forward(a.ex))
	return true
}

// Head implements l7.Response.
func (a *attempt) Head(w l7.Waker) (*l7.ResponseHead, error) {
	for {
		head, err := a.inner.Head(w)
		if a.app && err == nil {
			// What it says in the mesh's name would be taken for its proxy's word.
			head.Fields = slices.DeleteFunc(head.Fields, isMesh)
		}
		if a.route == nil || a.state == nil {
			return head, err
		}
		if err == nil {
			noteFar(&a.ex.Record, head)
			if a.turnedAway(head) {
				if a.again() {
					continue
				}
				return head, nil
			}
			if a.state.Ejected() { // it answered on a connection that it had kept
				a.link.plane.succeeded(context.Background(), a.route.endpoints[a.tried[a.n-1]])
			}
			return head, nil
		}
		if errors.Is(err, errOverflow) {
			a.release()
			a.set(a.overflow(a.route, "pending"))
			continue
		}
		failure, ok := errors.AsType[*l7.Error](err)
		if !ok || failure.Reason != l7.ConnectFailed {
			return head, err
		}
		if errors.Is(err, ca.ErrNoLeaf) { // ours: another endpoint would not help
			a.release()
			a.set(a.ex.Fail(&l7.Error{Reason: l7.NoLeaf, Err: err}))
			continue
		}
		p := a.link.plane
		p.log.LogAttrs(context.Background(), slog.LevelDebug, "endpoint could not be used",
			slog.String("cluster", a.route.cluster.Name), slog.String("instance", a.ex.Record.Endpoint), slog.Any("error", err))
		if a.route.picker.Pick(a.tried[:a.n]) < 0 || a.n >= p.limits.Attempts {
			return head, err
		}
		a.release()
		if !a.next() {
			a.set(a.ex.Fail(failure))
		}
	}
}

func isMesh(f http1.Field) bool { return f.ID == http1.MeshHeader }

// errTurnedAway is what counts against an endpoint whose proxy is there and whose application is not.
var errTurnedAway = errors.New("its application accepts no connection")

// turnedAway reports whether the proxy of the endpoint answered that the application got nothing of the request, because it
// accepts no connections: it has died, and the plan does not know yet. Another instance may be asked whatever the method is.
func (a *attempt) turnedAway(head *l7.ResponseHead) bool {
	if head.Status != l7.ConnectFailed.Status() {
		return false
	}
	for i := range head.Fields {
		f := &head.Fields[i]
		if isMesh(*f) && string(f.Value) == l7.ConnectFailed.String() && equalFold(f.Name, l7.FieldError) {
			a.link.plane.failed(context.Background(), a.route.endpoints[a.tried[a.n-1]], errTurnedAway)
			return true
		}
	}
	return false
}

// again moves to another endpoint after an answer that nothing was done, and reports false if that answer must do: none is
// left, or bytes of the request's body are gone.
func (a *attempt) again() bool {
	if a.ex.Body != nil || a.n >= a.link.plane.limits.Attempts || a.route.picker.Pick(a.tried[:a.n]) < 0 {
		return false
	}
	for range 4 { // the answer is one line; without it the connection can be used again
		if _, err := a.inner.Next(1<<10, nil); err != nil {
			break
		}
	}
	a.release()
	a.ex.Record.Retried = true
	if !a.next() {
		a.set(a.ex.Fail(&l7.Error{Reason: l7.ConnectFailed, Err: errTurnedAway}))
	}
	return true
}

// overflow answers a request that a limit refuses.
func (a *attempt) overflow(route *upstreamRoute, limit string) l7.Response {
	a.link.plane.health.overflow(route, limit)
	return a.ex.Fail(&l7.Error{Reason: l7.Overload, Detail: "the upstream's limit of " + limit})
}

// release lets go of the endpoint that was tried last.
func (a *attempt) release() {
	a.mu.Lock()
	inner := a.inner
	a.inner = nil
	a.mu.Unlock()
	inner.Close()
	if a.state != nil {
		a.state.End()
		a.state = nil
	}
}

// Next implements l7.Body.
func (a *attempt) Next(limit int, w l7.Waker) ([]byte, error) { return a.inner.Next(limit, w) }

// Trailers implements l7.Body.
func (a *attempt) Trailers() http1.Fields { return a.inner.Trailers() }

// Blocking implements l7.Body.
func (a *attempt) Blocking() bool { return a.inner.Blocking() }

// Cancel implements l7.Body.
func (a *attempt) Cancel(r l7.Reason) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.canceled = r
	if a.inner != nil {
		a.inner.Cancel(r)
	}
}

// Close implements l7.Response.
func (a *attempt) Close() {
	a.release()
	if a.load != nil {
		a.load.requests.Add(-1)
		a.load = nil
	}
	a.ex, a.route = nil, nil // an idle link keeps nothing of its last exchange alive
	a.link.end()
}

// record counts a finished exchange.
func (p *Plane) record(side direction, r *l7.Record) {
	if r.Reason != l7.None {
		p.metrics.failures.WithLabelValues(string(side), r.Reason.String()).Inc()
	}
	l, ok := r.User.(*link)
	if p.access.on.Load() {
		p.access.request(side, r, l)
	}
	if r.Reason != l7.None || r.ErrorID != "" || !p.watch.idle() {
		p.requestEnded(side, r, l)
	}
	if !ok {
		return // refused before the handler was asked: no HTTP as this mesh accepts it
	}
	class := r.Status / 100
	if class < 0 || class >= len(classes) {
		class = 0
	}
	l.edge.requests[class].Inc()
	l.edge.duration.Observe(r.Duration.Seconds())
	if r.Err != nil && p.log.Enabled(context.Background(), slog.LevelDebug) {
		p.log.LogAttrs(context.Background(), slog.LevelDebug, "request failed", slog.String("error_id", r.ErrorID),
			slog.String("source", l.source.String()), slog.String("destination", r.Destination.String()),
			slog.String("reason", r.Reason.String()), slog.Int("status", r.Status), slog.Any("error", r.Err))
	}
}
