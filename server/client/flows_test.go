package client_test

import (
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/client"
)

// What a record says by itself, for every kind of it.
func TestRecount(t *testing.T) {
	now := time.Date(2026, 3, 1, 9, 12, 58, 0, time.UTC)
	rule := 1
	base := flow.Record{
		Time: now.Add(-14 * time.Second), Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Denied, Node: "vm-b",
		Source: spiffe.Service("mesh.example.com", "default", "web"), Destination: spiffe.Service("mesh.example.com", "shop", "api"), Port: "http",
		Method: "GET", Path: "/v1", Intention: "web → shop/api", ErrorID: "7f3a91", Plan: catalog.Position{Generation: "g", Revision: 9},
	}
	for name, row := range map[string]struct {
		change        func(*flow.Record)
		verdict, fact string
		next          string
	}{
		"an action": {func(r *flow.Record) { r.Decision = "action" }, "DENIED by policy", "intention web → shop/api denies", `meshctl intention allow web shop/api --http "GET /v1"`},
		"a rule":    {func(r *flow.Record) { r.Decision, r.Rule = "rule", &rule }, "DENIED by policy", "intention web → shop/api, rule 2, denies", ""},
		"no rule":   {func(r *flow.Record) { r.Decision = "no-rule-matched" }, "DENIED by policy", "none of its rules matches GET /v1", ""},
		"expired":   {func(r *flow.Record) { r.Decision = "expired" }, "DENIED by policy", "has expired", ""},
		"a port":    {func(r *flow.Record) { r.Decision = "port-not-covered" }, "DENIED by policy", "does not cover port http", ""},
		"no HTTP":   {func(r *flow.Record) { r.Decision = "not-http" }, "DENIED by policy", "has HTTP rules, and the traffic is not HTTP", ""},
		"none":      {func(r *flow.Record) { r.Decision = "no-intention" }, "DENIED by policy", "no intention allows web to call shop/api", ""},
		"the near proxy": {
			func(r *flow.Record) {
				r.Direction, r.Decision, r.Cause = flow.Outbound, "", "no intention allows web to call shop/api"
			},
			"DENIED by policy", "seen by the caller's proxy on node vm-b, under plan 9", "",
		},
		"cut":       {func(r *flow.Record) { r.Kind, r.Decision, r.Reason = flow.TCP, "action", "policy-changed" }, "DENIED by policy", "it was allowed, and was cut when plan 9 denied it", "meshctl intention allow web shop/api"},
		"untrusted": {func(r *flow.Record) { r.Decision, r.Reason = "action", "untrusted" }, "DENIED by policy", "trusted no more", ""},
		"a stranger": {
			func(r *flow.Record) {
				*r = flow.Record{Time: r.Time, Kind: flow.TCP, Direction: flow.Inbound, Verdict: flow.Refused, Peer: "10.0.0.9:1", Reason: "plaintext", Cause: "no TLS"}
			},
			"REFUSED on the mesh port: plaintext", "nobody that could prove who it is, from 10.0.0.9:1", "call through a declared upstream",
		},
		"no instance": {
			func(r *flow.Record) {
				r.Verdict, r.Status, r.Reason, r.Cause = flow.Failed, 503, "no-healthy-instance", "none left"
			},
			"FAILED: no-healthy-instance", "no-healthy-instance, answered with 503: none left", "meshctl instances shop/api -o wide",
		},
		"a broken application": {func(r *flow.Record) { r.Verdict, r.Reason, r.Endpoint = flow.Failed, "upstream-reset", "api-2" }, "FAILED: upstream-reset", "instance api-2", "log of shop/api, instance api-2"},
		"a bad request":        {func(r *flow.Record) { r.Verdict, r.Reason = flow.Failed, "bad-request" }, "FAILED: bad-request", "bad-request", "correct the client"},
		"a limit":              {func(r *flow.Record) { r.Verdict, r.Reason = flow.Failed, "overload" }, "FAILED: overload", "overload", "meshctl top --dst shop/api"},
		"no certificate":       {func(r *flow.Record) { r.Verdict, r.Reason = flow.Failed, "no-leaf" }, "FAILED: no-leaf", "no-leaf", "meshctl check, on node vm-b"},
		"something else":       {func(r *flow.Record) { r.Verdict, r.Reason = flow.Failed, "draining" }, "FAILED: draining", "draining", "docs/reference/errors.md"},
		"the far proxy":        {func(r *flow.Record) { r.Verdict, r.Status, r.Reason = flow.Passed, 403, "denied" }, "ANSWERED by the destination's proxy: denied", "answered with 403, denied; it knows why", "meshctl explain id:7f3a91"},
		"a path that was cut": {
			func(r *flow.Record) { r.Decision, r.Path = "no-intention", "/"+strings.Repeat("x", flow.MaxPath-1) },
			"DENIED by policy", "no intention", "meshctl intention allow web shop/api",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := base
			row.change(&r)
			e := client.Recount(r, "mesh.example.com", now)
			var text strings.Builder
			for _, f := range e.Facts {
				text.WriteString(f.Text + "\n")
			}
			if e.Verdict != row.verdict || !strings.Contains(text.String(), row.fact) || !strings.Contains(text.String(), "(14s ago)") || e.Works || e.Access.Allowed {
				t.Errorf("%s\n%s", e.Verdict, text.String())
			}
			if len(e.Next) == 0 || row.next != "" && !strings.Contains(e.Next[0], row.next) {
				t.Errorf("next: %q, want %q", e.Next, row.next)
			}
			if name == "a path that was cut" && strings.Contains(e.Next[0], "--http") {
				t.Errorf("next allows half a path: %q", e.Next)
			}
		})
	}
}
