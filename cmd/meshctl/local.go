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
	"strings"
	"time"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/meshpb"
)

// localStatus asks the agent of this host. It needs no token and no server.
func localStatus(ctx context.Context, socket string) (agent.Status, error) {
	var st agent.Status
	return st, localCall(ctx, socket, http.MethodGet, "/v1/agent/status", &st)
}

// localCall asks the agent of this host for a JSON answer.
func localCall(ctx context.Context, socket, method, path string, answer any) error {
	return localCallWithin(ctx, localTimeout, socket, method, path, answer)
}

// localCallWithin gives the agent another time than usual to answer.
func localCallWithin(ctx context.Context, timeout time.Duration, socket, method, path string, answer any) error {
	data, err := localRawWithin(ctx, timeout, socket, method, path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("the agent's answer is not what this version understands: %w", err)
	}
	return nil
}

const (
	localTimeout = 10 * time.Second
	maxLocal     = 64 << 20
)

// localRaw asks the agent of this host.
func localRaw(ctx context.Context, socket, method, path string) ([]byte, error) {
	return localRawWithin(ctx, localTimeout, socket, method, path)
}

func localRawWithin(ctx context.Context, timeout time.Duration, socket, method, path string) ([]byte, error) {
	var d net.Dialer
	c := &http.Client{Timeout: timeout, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		if os.IsPermission(err) {
			return nil, fail(exitPermission, "the agent's socket %s: run this as root or as a member of its group", socket)
		}
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op
		}
		return nil, fail(exitUnreachable, "the agent does not answer: %v; does it run?", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxLocal))
	if err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return data, nil
	}
	var refusal struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(data, &refusal) != nil || refusal.Error == "" {
		refusal.Error = strings.TrimSpace(string(data))
	}
	code := exitError
	switch resp.StatusCode {
	case http.StatusForbidden:
		code = exitPermission
	case http.StatusNotFound:
		code = exitNotFound
	case http.StatusServiceUnavailable:
		code = exitUnreachable
	}
	return nil, fail(code, "the agent refuses: %s", refusal.Error)
}

// localReport looks at this host through its agent.
func localReport(ctx context.Context, socket string) (report, error) {
	var r report
	st, err := localStatus(ctx, socket)
	if err != nil {
		return r, err
	}
	if st.TrustDomain == "" {
		r.add(client.FactFail, "node %s has not joined: %s → meshctl token join --node %s, on a server", st.Node, dash(st.JoinError), st.Node)
		return r, nil
	}
	r.add(client.FactOK, "node %s of %s, mesh address %s", st.Node, st.TrustDomain, dash(st.Address))
	r.servers(st)
	r.proxies(st)
	r.leaves(st)
	r.services(st)
	for _, l := range st.Listeners {
		if l.Waiting != "" {
			r.add(client.FactFail, "%s cannot listen on %s: %s", l.Name, l.Address, l.Waiting)
		}
	}
	for _, f := range st.Findings {
		r.add(client.FactWarn, "%s", f)
	}
	return r, nil
}

func (r *report) servers(st agent.Status) {
	switch {
	case st.Server.Server != "":
		r.add(client.FactOK, "connected to server %s (%s) for %s", st.Server.ServerID, st.Server.Server, since(st.Server.Since))
	default:
		first := time.Time{}
		for _, l := range st.Leaves {
			if first.IsZero() || l.NotAfter.Before(first) {
				first = l.NotAfter
			}
		}
		text := fmt.Sprintf("no server for %s (%s); serving from disk", since(st.Server.Since), dash(st.Server.Error))
		if !first.IsZero() {
			text += ", the first certificate ends in " + time.Until(first).Round(time.Minute).String()
		}
		if st.Server.Refused == meshpb.ReasonNodeUnknown || st.Server.Refused == meshpb.ReasonNodeReplaced {
			text += " → put a token of meshctl token join --node " + st.Node + " --replace into the agent's token file"
		}
		r.add(client.FactFail, "%s", text)
	}
	for _, refusal := range st.Registration.Refusals {
		r.add(client.FactFail, "%s/%s is not registered: %s", refusal.Service, refusal.Instance, refusal.Reason)
	}
	if st.Registration.Error != "" {
		r.add(client.FactFail, "registration: %s", st.Registration.Error)
	}
}

func (r *report) proxies(st agent.Status) {
	active := false
	for _, p := range st.Proxies {
		switch {
		case p.State == feed.Starting:
			continue
		case p.State != feed.Active:
			r.add(client.FactOK, "proxy %s (process %d) drains, %d connections are open and cut in: %s", p.Proxy, p.PID, p.Open, cutIn(p, time.Now()))
			continue
		case p.Refused != "":
			r.add(client.FactFail, "proxy %s refuses its plan: %s", p.Proxy, p.Refused)
		case p.Applied != p.Wanted:
			r.add(client.FactWarn, "proxy %s runs plan %d, %d is on its way", p.Proxy, p.Applied.Revision, p.Wanted.Revision)
		default:
			r.add(client.FactOK, "proxy %s runs plan %d, %d connections are open", p.Proxy, p.Applied.Revision, p.Open)
		}
		active = true
	}
	if !active {
		r.add(client.FactFail, "no mesh-proxy is attached → systemctl status mesh-proxy")
	}
	for _, p := range st.Problems {
		r.add(client.FactWarn, "left out of the plan: %s: %s", p.Where, p.What)
	}
	for _, d := range st.Denied {
		source := catalog.Name{Namespace: d.Source.Namespace, Name: d.Source.Name}.Short()
		destination := catalog.Name{Namespace: d.Destination.Namespace, Name: d.Destination.Name}.Short()
		r.add(client.FactWarn, "%s may not call its upstream %s: %s → meshctl explain %s %s", source, destination, d.Reason, source, destination)
	}
}

func (r *report) leaves(st agent.Status) {
	for _, l := range st.Leaves {
		left := time.Until(l.NotAfter).Round(time.Minute)
		switch {
		case l.NotAfter.IsZero():
			r.add(client.FactFail, "no certificate for %s: %s", l.ID, dash(l.Error))
		case l.Alarm:
			r.add(client.FactFail, "the certificate of %s ends in %s and is not renewed: %s", l.ID, left, dash(l.Error))
		case l.Error != "":
			r.add(client.FactWarn, "the certificate of %s lasts %s; its renewal failed: %s", l.ID, left, l.Error)
		default:
			r.add(client.FactOK, "identity %s, %s left", l.ID, left)
		}
	}
}

func (r *report) services(st agent.Status) {
	for _, i := range st.Instances {
		var failing []string
		for _, c := range i.Checks {
			if c.Health != catalog.HealthPassing {
				failing = append(failing, fmt.Sprintf("check %s: %s", c.Name, strings.TrimSpace(c.Output)))
			}
		}
		mark := client.FactOK
		if !i.Health.Usable() {
			mark = client.FactFail
		} else if i.Health != catalog.HealthPassing {
			mark = client.FactWarn
		}
		text := fmt.Sprintf("instance %s/%s is %s", i.Service, i.ID, i.Health)
		if len(failing) > 0 {
			text += ": " + strings.Join(failing, "; ")
		}
		r.add(mark, "%s", text)
	}
	if st.FolderError != "" {
		r.add(client.FactFail, "the folder of definitions: %s", st.FolderError)
	}
	for _, f := range st.Files {
		for _, p := range f.Problems {
			r.add(client.FactFail, "%s; its last good version stays in force", p)
		}
	}
}
