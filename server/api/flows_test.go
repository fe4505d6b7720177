package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// seen is the denial that stand-in hosts have seen.
func seen() flow.Record {
	return flow.Record{
		Time: time.Now().UTC().Truncate(time.Second).Add(-14 * time.Second), Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Denied, Node: "vm-b",
		Source: spiffe.Service(trustDomain, "default", "web"), Destination: spiffe.Service(trustDomain, "default", "api"), Port: "http",
		Peer: "10.0.0.1:3333", Method: "POST", Path: "/v1/jobs", Status: 403, Reason: "denied", Decision: "no-rule-matched",
		Intention: "web → api", ErrorID: "7f3a91", Plan: catalog.Position{Generation: "g", Revision: 3},
	}
}

// hosts makes the stand-in fleet answer.
func (w *world) hosts(answer func(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error) {
	w.fleet.ask.Store(&answer)
}

func jsonOf(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestDenialsAreListed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	want := flow.Answer{Records: []flow.Record{seen()}, Caught: true, Kept: flow.Kept{Records: 1024}, Hosts: 2, Silent: []string{"vm-c: no answer"}}
	w.hosts(func(_ context.Context, q flow.Query, emit func(flow.Answer) error) error {
		if diff := cmp.Diff(flow.Query{Want: flow.Denials, Source: "web", Limit: 100, Failed: true}, q); diff != "" {
			return errors.New(diff)
		}
		return emit(want)
	})
	c := w.client(t)
	got, err := c.Denials(t.Context(), flow.Query{Source: "web", Failed: true})
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	for _, row := range []struct {
		path, token string
		want        int
	}{
		{"/v1/denials?src=web&limit=100&failed=true", w.token, http.StatusOK},
		{"/v1/denials", w.token, http.StatusServiceUnavailable}, // the hosts refuse
		{"/v1/denials", "", http.StatusUnauthorized},
		{"/v1/tap", "", http.StatusUnauthorized},
		{"/v1/top", "", http.StatusUnauthorized},
		{"/v1/explain/7f3a91", "", http.StatusUnauthorized},
		{"/v1/denials?sorce=web", w.token, http.StatusBadRequest},
		{"/v1/tap?dst=a/b/c", w.token, http.StatusBadRequest},
		{"/v1/top?interval=1h", w.token, http.StatusBadRequest},
		{"/v1/explain/7F3A91", w.token, http.StatusBadRequest},
	} {
		if code, body := call(t, http.MethodGet, w.url+row.path, row.token, ""); code != row.want {
			t.Errorf("%s: %d %s, want %d", row.path, code, body, row.want)
		}
	}
}

func TestTapStreams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	left := make(chan struct{})
	w.hosts(func(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
		defer close(left)
		if q.Want != flow.Records || q.Destination != "api" {
			return errors.New("not asked as it should")
		}
		if err := emit(flow.Answer{Caught: true, Hosts: 2}); err != nil {
			return err
		}
		if err := emit(flow.Answer{Records: []flow.Record{seen()}, Dropped: 3}); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	})
	c := w.client(t)
	var got []flow.Answer
	for a, err := range c.Tap(t.Context(), flow.Query{Destination: "api"}) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, a); len(got) == 2 {
			break
		}
	}
	want := []flow.Answer{{Caught: true, Hosts: 2}, {Records: []flow.Record{seen()}, Dropped: 3}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	<-left
}

// A tap ends when the token that opened it is taken away, and tells why.
func TestTapEndsWithItsToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hosts(func(ctx context.Context, _ flow.Query, emit func(flow.Answer) error) error {
		err := emit(flow.Answer{Caught: true})
		<-ctx.Done()
		return err
	})
	record, secret := acl.NewToken(acl.PolicyAdmin, "passing", time.Now())
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/v1/tap", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	w.update(t, func(tx *state.Tx) error {
		state.Tokens.Delete(tx, acl.Hash([]byte(secret)))
		return nil
	})
	var all strings.Builder
	buffer := make([]byte, 4096)
	for {
		n, err := resp.Body.Read(buffer)
		all.Write(buffer[:n])
		if err != nil {
			break
		}
	}
	if !strings.Contains(all.String(), `"code":"unauthorized"`) {
		t.Errorf("it ended with %q", all.String())
	}
}

func TestExplainID(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	answer := flow.Answer{Records: []flow.Record{seen()}, Hosts: 2}
	w.hosts(func(_ context.Context, q flow.Query, emit func(flow.Answer) error) error {
		if q.Want != flow.Find || q.ID != "7f3a91" {
			return emit(flow.Answer{Hosts: 2, Kept: flow.Kept{Records: 1024, Since: time.Unix(1e9, 0)}, Silent: []string{"vm-c: no answer"}})
		}
		return emit(answer)
	})
	c := w.client(t)
	service := func(name string) string {
		return `{"name":"` + name + `","ports":[{"name":"http","protocol":"http","default":true}]}`
	}
	rules := intentions.Intention{Source: "web", Destination: "api", Rules: []intentions.Rule{{Action: "allow", Methods: []string{"GET"}, PathPrefix: "/v1/"}}}
	for path, body := range map[string]string{
		"/v1/namespaces/default":   `{"name":"default"}`,
		"/v1/services/default/api": service("api"), "/v1/services/default/web": service("web"),
	} {
		if code, out := call(t, http.MethodPut, w.url+path, w.token, body); code != http.StatusOK {
			t.Fatalf("%s: %d %s", path, code, out)
		}
	}
	put := func(i intentions.Intention) {
		t.Helper()
		if code, out := call(t, http.MethodPut, w.url+"/v1/intentions/default/api/default/web", w.token, jsonOf(t, i)); code != http.StatusOK {
			t.Fatalf("%d %s", code, out)
		}
	}
	put(rules)
	e, err := c.ExplainID(t.Context(), "7f3a91")
	if err != nil {
		t.Fatal(err)
	}
	text := facts(e)
	for _, want := range []string{
		"web → api POST /v1/jobs at", "s ago), id 7f3a91", "caller: spiffe://mesh.example.com/ns/default/svc/web, from 10.0.0.1:3333",
		"seen by the destination's proxy on node vm-b, under plan 3", "✗ intention web → api: none of its rules matches POST /v1/jobs",
		`✗ now: intention web → api, rule 1 of 1 "allow GET /v1/*": POST matches none → deny; created`,
		`next: meshctl intention allow web api --http "POST /v1/jobs" --add`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the explanation lacks %q:\n%s", want, text)
		}
	}
	if e.Verdict != "DENIED by policy" || e.Works || len(e.Records) != 1 {
		t.Errorf("%+v", e)
	}

	put(intentions.Intention{Source: "web", Destination: "api", Action: "allow"})
	if e, err = c.ExplainID(t.Context(), "7f3a91"); err != nil || !strings.Contains(facts(e), "✓ now: intention web → api → allow") || len(e.Next) != 0 {
		t.Errorf("after it was allowed: %v\n%s", err, facts(e))
	}

	caller := seen()
	caller.Direction, caller.Verdict, caller.Node, caller.Decision, caller.Intention = flow.Outbound, flow.Passed, "vm-a", "", ""
	answer.Records = []flow.Record{caller, seen()}
	if e, err = c.ExplainID(t.Context(), "7f3a91"); err != nil || e.Verdict != "DENIED by policy" || len(e.Records) != 2 || !strings.Contains(facts(e), "on node vm-b") {
		t.Errorf("of both sides the one that denied must tell: %v\n%s", err, facts(e))
	}
	answer.Records = []flow.Record{caller}
	if e, err = c.ExplainID(t.Context(), "7f3a91"); err != nil || e.Verdict != "ANSWERED by the destination's proxy: denied" || e.Works {
		t.Errorf("the caller's side alone: %v\n%s %s", err, e.Verdict, facts(e))
	}

	_, err = c.ExplainID(t.Context(), "000000")
	if client.CodeOf(err) != client.CodeNotFound || !strings.Contains(err.Error(), "each keeps its newest 1024") || !strings.Contains(err.Error(), "vm-c: no answer") {
		t.Errorf("unknown: %v", err)
	}
	answer.Records[0] = flow.Record{
		Time: time.Now(), Kind: flow.HTTP, Direction: flow.Outbound, Verdict: flow.Failed, Node: "vm-a", ErrorID: "7f3a91",
		Source: seen().Source, Destination: seen().Destination, Status: 503, Reason: "connect-failed", Cause: "connection refused", Endpoint: "api",
	}
	if e, err = c.ExplainID(t.Context(), "7f3a91"); err != nil || e.Verdict != "FAILED: connect-failed" || e.Works ||
		!strings.Contains(facts(e), "✗ connect-failed, answered with 503, instance api: connection refused") {
		t.Errorf("a failure: %v\n%s %s", err, e.Verdict, facts(e))
	}
}

func facts(e client.Explanation) string {
	marks := map[string]string{client.FactOK: "✓", client.FactWarn: "!", client.FactFail: "✗"}
	var b strings.Builder
	for _, f := range e.Facts {
		b.WriteString(marks[f.Mark] + " " + f.Text + "\n")
	}
	for _, n := range e.Next {
		b.WriteString("next: " + n + "\n")
	}
	return b.String()
}
