package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
)

// waiter waits, if it is asked to, until the proxies that a change concerns
// have applied it.
type waiter struct {
	on    bool
	limit time.Duration
}

func (w *waiter) flags(c *cobra.Command) {
	c.Flags().BoolVar(&w.on, "wait", false, "wait until the proxies concerned have applied the change")
	c.Flags().DurationVar(&w.limit, "timeout", defaultWait, "how long --wait waits; then the exit code is 8")
}

// start is what a wait compares with.
type start struct {
	services []catalog.Name
	// callers says that the proxies of those who call the services are meant.
	callers bool
	closed  uint64
	time    time.Time
}

// before notes how many connections were closed before the change.
func (w *waiter) before(ctx context.Context, api *client.Client, services []catalog.Name) start {
	s := start{services: services, time: time.Now()}
	if !w.on || len(services) == 0 {
		return s
	}
	if r, err := api.WaitRollout(ctx, catalog.Position{}, services, 0); err == nil {
		s.closed = r.Closed
	}
	return s
}

func (w *waiter) wait(ctx context.Context, a *app, api *client.Client, pos catalog.Position, s start) error {
	if !w.on || len(s.services) == 0 && !s.callers {
		return nil
	}
	var r client.Rollout
	for end := time.Now().Add(w.limit); ; {
		var err error
		ask := api.WaitRollout
		if s.callers {
			ask = api.WaitCallers
		}
		if r, err = ask(ctx, pos, s.services, min(time.Until(end), defaultWait)); err != nil {
			return err
		}
		if r.Done || len(r.Refused) > 0 || time.Now().After(end) {
			break
		}
	}
	var sides []string
	for _, one := range r.Services {
		sides = append(sides, fmt.Sprintf("%s %d/%d", one.Service, one.Applied, one.Total))
	}
	who := strings.Join(sides, ", ") + " proxies"
	switch {
	case s.callers && len(sides) == 0:
		who = "nobody calls it"
	case s.callers:
		who = "callers " + who
	}
	line := fmt.Sprintf("revision %d: %s, %.1f s", pos.Revision, who, time.Since(s.time).Seconds())
	if r.Closed > s.closed {
		line += fmt.Sprintf(", %d connections closed", r.Closed-s.closed)
	}
	if _, err := fmt.Fprintln(a.err, line); err != nil {
		return err
	}
	switch {
	case len(r.Refused) > 0:
		return fail(exitError, "a proxy refused the plan: %s", strings.Join(r.Refused, "; "))
	case len(r.Unasked) > 0:
		return fail(exitUnknown, "server %s could not be asked what the proxies run that are connected to it; the change is stored, and they will apply it",
			strings.Join(r.Unasked, ", "))
	case !r.Done:
		return fail(exitUnknown, "not all proxies have applied it within %s; the change is stored, and they will when they are in touch again", w.limit)
	}
	return nil
}

// servicesOf are the services whose proxies a resource concerns.
func servicesOf(v any) []catalog.Name {
	switch r := v.(type) {
	case intentions.Intention:
		if key, err := r.Key(); err == nil {
			return keyServices(key)
		}
	case catalog.Service:
		return []catalog.Name{r.Ref()}
	}
	return nil
}

// keyServices are the two sides of an intention, as far as they name a service.
func keyServices(k intentions.Key) []catalog.Name {
	var names []catalog.Name
	if k.Destination != "*" {
		names = append(names, catalog.Name{Namespace: k.DestinationNamespace, Name: k.Destination})
	}
	if k.Source != "*" && k.SourceTrustDomain == "" {
		names = append(names, catalog.Name{Namespace: k.SourceNamespace, Name: k.Source})
	}
	return names
}
