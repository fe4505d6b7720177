package flow_test

import (
	"encoding/json"
	"errors"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy/flow"
)

const td = "mesh.example.com"

func service(ns, name string) spiffe.ID { return spiffe.Service(td, ns, name) }

func TestFilter(t *testing.T) {
	passed := flow.Seen{
		Direction: flow.Inbound, Verdict: flow.Passed, Source: service("default", "web"), Destination: service("batch", "api"),
		Method: []byte("GET"), Path: []byte("/v1/jobs"), Status: 404,
	}
	with := func(change func(*flow.Seen)) flow.Seen {
		s := passed
		change(&s)
		return s
	}
	outbound := with(func(s *flow.Seen) { s.Direction = flow.Outbound })
	denied := with(func(s *flow.Seen) { s.Direction, s.Verdict, s.Status = flow.Outbound, flow.Denied, 403 })
	failed := with(func(s *flow.Seen) { s.Verdict, s.Status = flow.Failed, 503 })
	refused := flow.Seen{Direction: flow.Inbound, Verdict: flow.Refused}
	for name, row := range map[string]struct {
		query string
		want  flow.Want
		seen  flow.Seen
		match bool
	}{
		"everything":                            {"", flow.Records, passed, true},
		"the caller's side of what it sent on":  {"", flow.Records, outbound, false},
		"both sides":                            {"both=true", flow.Records, outbound, true},
		"a denial by the caller's proxy":        {"", flow.Records, denied, true},
		"source":                                {"src=web", flow.Records, passed, true},
		"source of another namespace":           {"src=batch/web", flow.Records, passed, false},
		"source by identity":                    {"src=spiffe://mesh.example.com/ns/default/svc/web", flow.Records, passed, true},
		"source by identity of another mesh":    {"src=spiffe://other.example.com/ns/default/svc/web", flow.Records, passed, false},
		"destination":                           {"dst=batch/api", flow.Records, passed, true},
		"destination by namespace":              {"dst=batch/*", flow.Records, passed, true},
		"destination of another namespace":      {"dst=default/*", flow.Records, passed, false},
		"everybody":                             {"src=*&dst=*", flow.Records, refused, true},
		"a stranger has no name":                {"src=web", flow.Records, refused, false},
		"status":                                {"status=404", flow.Records, passed, true},
		"another status":                        {"status=403", flow.Records, passed, false},
		"class of status":                       {"status=4xx", flow.Records, passed, true},
		"another class":                         {"status=5xx", flow.Records, passed, false},
		"method in any case":                    {"method=get", flow.Records, passed, true},
		"another method":                        {"method=POST", flow.Records, passed, false},
		"prefix of the path":                    {"path=/v1/", flow.Records, passed, true},
		"another path":                          {"path=/v2", flow.Records, passed, false},
		"only denied":                           {"denied=true", flow.Records, passed, false},
		"denied is":                             {"denied=true", flow.Records, denied, true},
		"refused counts as denied":              {"denied=true", flow.Records, refused, true},
		"a failure is no denial":                {"denied=true", flow.Records, failed, false},
		"denials have nothing that passed":      {"both=true", flow.Denials, outbound, false},
		"a failure is shown if it is asked for": {"denied=true&failed=true", flow.Records, failed, true},
		"but nothing that passed":               {"denied=true&failed=true", flow.Records, passed, false},
		"denials have no failures":              {"", flow.Denials, failed, false},
		"unless they are asked for":             {"failed=true", flow.Denials, failed, true},
		"denials of the caller's proxy, always": {"dst=batch/api", flow.Denials, denied, true},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := url.ParseQuery(row.query)
			if err != nil {
				t.Fatal(err)
			}
			q, err := flow.ParseQuery(row.want, v)
			if err != nil {
				t.Fatal(err)
			}
			f, err := q.Filter()
			if err != nil {
				t.Fatal(err)
			}
			if got := f.Match(&row.seen); got != row.match {
				t.Errorf("match is %v, want %v", got, row.match)
			}
			if n := testing.AllocsPerRun(10, func() { f.Match(&row.seen) }); n != 0 {
				t.Errorf("%v allocations, want none", n)
			}
		})
	}
}

func TestQueriesThatAreRefused(t *testing.T) {
	for _, text := range []string{
		"src=We b", "dst=a/b/c", "dst=*/api", "src=spiffe://x", "status=9xx", "status=0", "status=xx", "status=4x", "path=v1", "limit=-1",
		"limit=5001", "limit=x", "denied=maybe", "since=yesterday", "interval=1ms", "interval=x", "sorce=web", "src=web&src=api",
		"method=" + string(make([]byte, 33)),
	} {
		v, err := url.ParseQuery(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := flow.ParseQuery(flow.Records, v); !errors.Is(err, flow.ErrQuery) {
			t.Errorf("%q: got %v, want ErrQuery", text, err)
		}
	}
	for _, q := range []flow.Query{{}, {Want: "all"}, {Want: flow.Find}, {Want: flow.Find, ID: "7F3A91"}, {Want: flow.Find, ID: "7f3a9"}} {
		if err := q.Validate(); !errors.Is(err, flow.ErrQuery) {
			t.Errorf("%+v: got %v, want ErrQuery", q, err)
		}
	}
}

func TestValuesSurvive(t *testing.T) {
	for _, q := range []flow.Query{
		{Want: flow.Records},
		{Want: flow.Records, Source: "web", Destination: "batch/*", Status: "5xx", Method: "GET", Path: "/v1", Denied: true, Both: true},
		{Want: flow.Denials, Failed: true, Limit: 7, Since: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)},
		{Want: flow.Edges, Interval: 5e9},
	} {
		got, err := flow.ParseQuery(q.Want, q.Values())
		if diff := cmp.Diff(q, got); err != nil || diff != "" {
			t.Errorf("%v, %s", err, diff)
		}
	}
}

func TestNewest(t *testing.T) {
	at := func(s int, id string) flow.Record { return flow.Record{Time: time.Unix(int64(s), 0), ErrorID: id} }
	got := flow.Newest([]flow.Record{at(1, "a"), at(3, "c"), at(2, "b"), at(3, "d")}, 3)
	if diff := cmp.Diff([]flow.Record{at(3, "c"), at(3, "d"), at(2, "b")}, got); diff != "" {
		t.Error(diff)
	}
}

// FuzzQuery holds what comes from outside, as a URL and as JSON, to an error or to a query that survives.
func FuzzQuery(f *testing.F) {
	f.Add("src=web&dst=batch/*&status=5xx&path=/v1&limit=3", `{"want":"records","source":"web"}`)
	f.Add("since=2026-01-02T03:04:05Z&interval=2s&denied=true", `{"want":"find","id":"7f3a91"}`)
	f.Fuzz(func(t *testing.T, text, wire string) {
		if v, err := url.ParseQuery(text); err == nil {
			if q, err := flow.ParseQuery(flow.Denials, v); err == nil {
				again, err := flow.ParseQuery(flow.Denials, q.Values())
				if err != nil || !cmp.Equal(q, again) {
					t.Errorf("%q: %+v became %+v, %v", text, q, again, err)
				}
			}
		}
		var q flow.Query
		if json.Unmarshal([]byte(wire), &q) != nil {
			return
		}
		filter, err := q.Filter()
		if err != nil {
			return
		}
		filter.Match(&flow.Seen{Source: service("default", "web"), Path: []byte(text)})
	})
}
