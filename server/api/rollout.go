package api

import (
	"context"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
)

// rollout waits until the proxies have applied a position, one refuses, or the
// time asked for is over, and tells how far they are.
func (a *API) rollout(c *call) (any, error) {
	q := c.URL.Query()
	revision, err := strconv.ParseUint(q.Get("revision"), 10, 64)
	if err != nil {
		return nil, badField("revision", "%q is no revision", q.Get("revision"))
	}
	wait, err := time.ParseDuration(q.Get("wait"))
	if q.Get("wait") != "" && err != nil {
		return nil, badField("wait", "%q is no duration such as 30s", q.Get("wait"))
	}
	services, err := namesOf(q, "service")
	if err != nil {
		return nil, err
	}
	called, err := namesOf(q, "callers_of")
	if err != nil {
		return nil, err
	}
	pos := catalog.Position{Generation: q.Get("generation"), Revision: revision}
	ctx, cancel := context.WithTimeout(c.Context(), min(wait, maxWait))
	defer cancel()
	if !mayWatchRollout(c) {
		return nil, c.authorize(acl.Read, acl.Service, acl.Request{Some: true})
	}
	for {
		concerned := services
		if len(called) > 0 {
			concerned = slices.Concat(services, a.cfg.Fleet.Callers(called))
		}
		r, changed := a.cfg.Fleet.Rollout(pos, concerned)
		if r.Done || len(r.Refused) > 0 {
			return shownRollout(c, r), nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return shownRollout(c, r), nil
		}
	}
}

// mayWatchRollout: who sees services, or intentions, may wait for what becomes of
// them.
func mayWatchRollout(c *call) bool {
	anything := acl.Request{Some: true}
	return c.may(acl.Read, acl.Service, anything) || c.may(acl.Read, acl.Intention, anything)
}

// shownRollout leaves out what the caller may not see. What is left out counts: a
// change is done when all have it.
func shownRollout(c *call, r client.Rollout) client.Rollout {
	r.Services = slices.DeleteFunc(slices.Clone(r.Services), func(one client.RolloutService) bool {
		n, err := catalog.ParseName(one.Service)
		what := acl.Request{Namespace: n.Namespace, Name: n.Name}
		return err != nil || !c.may(acl.Read, acl.Service, what) && !c.may(acl.Read, acl.Intention, what)
	})
	if len(r.Refused) > 0 && !c.may(acl.Read, acl.Operator, acl.Request{}) {
		r.Refused = []string{"a proxy refused its plan; who may read operator sees which, and why"}
	}
	return r
}

// namesOf reads the services that a parameter names.
func namesOf(q url.Values, parameter string) ([]catalog.Name, error) {
	var names []catalog.Name
	for _, text := range q[parameter] {
		n, err := catalog.ParseName(text)
		if err != nil {
			return nil, badField(parameter, "%v", err)
		}
		names = append(names, n)
	}
	return names, nil
}
