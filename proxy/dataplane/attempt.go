package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/balance"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// attempt is one exchange on a link, and the response to it. For the mesh it forwards to one endpoint after another while none
// could be connected to, which is safe: nothing was sent. It lives until the exchange was told of.
type attempt struct {
	account
	link    *link
	ex      *l7.Exchange
	version version
	request intentions.HTTPRequest // as policy sees it; l.mu guards it, and what follows
	refused bool                   // it was answered by this proxy: there is nothing to cut
	cut     bool                   // it was cut
	before  *attempt               // in the link's list
	after   *attempt

	route    *upstreamRoute // nil towards a local application
	tried    [maxAttempts]int
	n        int
	state    *balance.State
	load     *load // of the cluster, where this request counts; nil if it does not
	app      bool  // it is the application that answers
	blocking bool  // what answers may be a source without a goroutine of its own
	moved    bool  // to another version of HTTP, which the endpoint's proxy speaks

	grpc    bool // the request is gRPC's
	status  int  // of gRPC, noStatus until it is known
	timeout [maxTimeout]byte

	// mu guards inner, which Cancel may ask for from any goroutine.
	mu       sync.Mutex
	inner    l7.Response
	canceled l7.Reason
}

// begin notes that an exchange runs, before its policy is asked: a change of plan in between must find it.
func (p *Plane) begin(l *link, ex *l7.Exchange, v version) *attempt {
	a, ok := p.attempts.Get().(*attempt)
	if !ok {
		a = &attempt{}
	}
	ex.Record.User, ex.Record.Rule = a, -1
	a.link, a.ex, a.version = l, ex, v
	a.decision = intentions.Decision{Rule: -1}
	a.grpc, a.status = isGRPC(&ex.Request), noStatus
	if a.grpc {
		a.limit()
	}
	l.mu.Lock()
	a.request = intentions.HTTPRequest{
		// Views of the head, which outlives the exchange. Decide keeps nothing.
		Method:  unsafe.String(unsafe.SliceData(ex.Request.Method), len(ex.Request.Method)), //nolint:gosec // see above
		Path:    unsafe.String(unsafe.SliceData(ex.Request.Path), len(ex.Request.Path)),     //nolint:gosec // see above
		Headers: (*headers)(&ex.Request.Fields),
	}
	if a.after = l.running; a.after != nil {
		a.after.before = a
	}
	l.running = a
	l.mu.Unlock()
	return a
}

// end notes that the exchange is over, before its head is used for the next.
func (a *attempt) end() {
	l := a.link
	l.mu.Lock()
	if a.before != nil {
		a.before.after = a.after
	} else {
		l.running = a.after
	}
	if a.after != nil {
		a.after.before = a.before
	}
	a.before, a.after = nil, nil
	a.request = intentions.HTTPRequest{}
	l.mu.Unlock()
}

// release gives an attempt back, once its exchange was told of.
func (p *Plane) release(a *attempt) {
	a.account, a.link = account{}, nil
	a.n, a.refused, a.cut, a.app, a.blocking, a.moved, a.canceled = 0, false, false, false, false, false, l7.None
	p.attempts.Put(a)
}

// decide asks the policy about the exchange. l.mu is held, or the caller is the one that runs it.
func (a *attempt) decide(in *inboundRoute, now time.Time) intentions.Decision {
	return in.policy.Decide(intentions.Request{
		Source: a.link.source, Destination: in.destination, Port: in.Port, Now: now, HTTP: &a.request,
	})
}

// fail answers with an error of our own.
func (a *attempt) fail(err *l7.Error) l7.Response {
	a.link.mu.Lock()
	a.refused = true
	a.link.mu.Unlock()
	a.set(a.ex.Fail(err))
	return a
}

// local forwards to the application.
func (a *attempt) local(in *inboundRoute) l7.Response {
	a.app = true
	if in.outside != nil {
		in.outside.prepare(&a.ex.Request)
	}
	pool, blocks := in.pool(a.version)
	a.blocking = blocks
	if !a.inTime() {
		a.set(a.ex.Fail(&l7.Error{Reason: l7.Timeout, Err: errTooLate}))
		return a
	}
	a.set(pool.Forward(a.ex))
	return a
}

// remote forwards to an endpoint of the route.
func (a *attempt) remote(route *upstreamRoute) l7.Response {
	a.route = route
	shared := route.shares(a.version)
	a.blocking = !shared || route.cluster.Upgrade
	if over := route.budget.takeRequest(shared); over != "" {
		a.route = nil
		a.set(a.overflow(route, over))
		return a
	}
	a.load = route.budget.load
	if !a.next() {
		a.set(a.ex.Fail(&l7.Error{Reason: l7.NoHealthyInstance, Err: errNoEndpoint}))
	}
	return a
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
	a.tried[a.n], a.moved = i, false
	a.n++
	a.state = a.route.states[i]
	a.state.Begin()
	a.link.plane.health.picked(a.route, a.state)
	a.ex.Record.Endpoint = a.route.endpoints[i].instance
	a.forward(a.route.endpoints[i])
	return true
}

// forward asks an endpoint.
func (a *attempt) forward(e *endpoint) {
	if !a.inTime() {
		a.set(a.ex.Fail(&l7.Error{Reason: l7.Timeout, Err: errTooLate}))
		return
	}
	a.set(e.upstream(a.version).Forward(a.ex))
}

// Head implements l7.Response.
func (a *attempt) Head(w l7.Waker) (*l7.ResponseHead, error) {
	for {
		head, err := a.inner.Head(w)
		if a.app && err == nil {
			// What it says in the mesh's name would be taken for its proxy's word.
			head.Fields = slices.DeleteFunc(head.Fields, isMesh)
		}
		if err == nil && a.grpc {
			a.note(head.Fields)
		}
		if a.route == nil || a.state == nil {
			return head, err
		}
		if err == nil {
			noteFar(&a.ex.Record, head, a.grpc)
			if a.turnedAway(head) {
				if a.again(w) {
					continue
				}
				return head, nil
			}
			if a.status != unavailable && a.state.Ejected() { // it answered on a connection that it had kept
				a.link.plane.succeeded(context.Background(), a.route.endpoints[a.tried[a.n-1]])
			}
			return head, nil
		}
		if errors.Is(err, errOverflow) {
			a.release()
			a.set(a.overflow(a.route, "pending"))
			continue
		}
		if errors.Is(err, errOtherVersion) && !a.moved {
			// Its proxy was replaced by one of another version of this program: it is asked in the way that it understands.
			a.moved = true
			a.drop()
			a.forward(a.route.endpoints[a.tried[a.n-1]])
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
	if head.Status != l7.ConnectFailed.Status() && (!a.grpc || head.Status != 200) {
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
func (a *attempt) again(w l7.Waker) bool {
	if a.ex.Body != nil || a.n >= a.link.plane.limits.Attempts || a.route.picker.Pick(a.tried[:a.n]) < 0 {
		return false
	}
	a.status = noStatus
	for n := 0; n < 4 && w == nil && a.inner.Blocking(); n++ { // the answer is one line; without it the connection can be used again
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

// drop closes what answers.
func (a *attempt) drop() {
	a.mu.Lock()
	inner := a.inner
	a.inner = nil
	a.mu.Unlock()
	inner.Close()
}

// release lets go of the endpoint that was tried last.
func (a *attempt) release() {
	a.drop()
	if a.state != nil {
		a.state.End()
		a.state = nil
	}
}

// Next implements l7.Body.
func (a *attempt) Next(limit int, w l7.Waker) ([]byte, error) { return a.inner.Next(limit, w) }

// Trailers implements l7.Body.
func (a *attempt) Trailers() http1.Fields {
	trailers := a.inner.Trailers()
	if a.grpc {
		a.note(trailers)
	}
	return trailers
}

// Blocking implements l7.Body. What it says holds for whatever answers in the end: a source that does not block may be waited for.
func (a *attempt) Blocking() bool { return a.blocking }

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
	a.end()
	a.ex, a.route = nil, nil
}
