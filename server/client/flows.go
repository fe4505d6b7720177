package client

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"time"

	"github.com/meshd/meshd/proxy/flow"
)

// EventAnswer is the type of the events of a tap, and of top: a flow.Answer.
const EventAnswer = "answer"

// Tap yields what ends from now on, as the proxies see it, until ctx ends, the
// caller stops, or the connection breaks, which is the last error. The first
// answer that is Caught tells that the hosts have begun. Requests that a reader
// is too slow for are dropped, and counted in Dropped.
func (c *Client) Tap(ctx context.Context, q flow.Query) iter.Seq2[flow.Answer, error] {
	q.Want = flow.Records
	return c.answers(ctx, "/v1/tap", q)
}

// Top yields samples of what the proxies count, as Tap yields records.
func (c *Client) Top(ctx context.Context, q flow.Query) iter.Seq2[flow.Answer, error] {
	q.Want = flow.Edges
	return c.answers(ctx, "/v1/top", q)
}

func (c *Client) answers(ctx context.Context, path string, q flow.Query) iter.Seq2[flow.Answer, error] {
	return func(yield func(flow.Answer, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		alarm := time.AfterFunc(watchSilence, cancel)
		defer alarm.Stop()
		resp, err := c.send(ctx, http.MethodGet, path+"?"+q.Values().Encode(), "", nil)
		if err != nil {
			yield(flow.Answer{}, err)
			return
		}
		defer resp.Body.Close() //nolint:errcheck // whoever stops reading needs no more
		for a, err := range readStream(resp.Body, func() { alarm.Reset(watchSilence) }, decodeAnswer) {
			if err != nil && CodeOf(err) == "" && !errors.Is(err, errEvent) {
				err = &Error{Code: CodeUnreachable, cause: err, Message: "the connection broke: " + rootText(err), Next: "begin again"}
			}
			if !yield(a, err) || err != nil {
				return
			}
		}
	}
}

func decodeAnswer(name, data string) (a flow.Answer, known bool, err error) {
	switch name {
	case EventAnswer:
		err = json.Unmarshal([]byte(data), &a)
	case EventError:
		var refusal Error
		if err = json.Unmarshal([]byte(data), &refusal); err == nil {
			return a, true, &refusal
		}
	default:
		return a, false, nil
	}
	if err != nil {
		err = fmt.Errorf("%w %q: %w", errEvent, name, err)
	}
	return a, true, err
}

// Denials returns what the proxies have kept of what they did not carry, the newest
// first.
func (c *Client) Denials(ctx context.Context, q flow.Query) (flow.Answer, error) {
	q.Want = flow.Denials
	var a flow.Answer
	return a, c.do(ctx, http.MethodGet, "/v1/denials?"+q.Values().Encode(), nil, &a)
}

// ExplainID explains the denial or error of which a client was told the ID. One
// that nobody remembers is an *Error with CodeNotFound.
func (c *Client) ExplainID(ctx context.Context, id string) (Explanation, error) {
	var e Explanation
	return e, c.do(ctx, http.MethodGet, "/v1/explain/"+id, nil, &e)
}

// UnknownID is the error of an ID that no proxy remembers; a is what they answered.
func UnknownID(id string, a flow.Answer) *Error {
	e := &Error{Code: CodeNotFound, Message: "no proxy remembers the id " + id, Next: "look into the access log of the hosts, if it is on: grep " + id}
	if a.Hosts == 0 {
		e.Message += ": none could be asked"
		return e
	}
	e.Message += fmt.Sprintf(": each keeps its newest %d denials and as many errors, until it ends", cmp.Or(a.Kept.Records, 1024))
	if !a.Kept.Since.IsZero() {
		e.Message += "; denials of before " + a.Kept.Since.UTC().Format(time.RFC3339) + " are partly gone"
	}
	for _, host := range a.Silent {
		e.Message += "; not asked: " + host
	}
	return e
}

// Telling returns the record that says most of those that have one id: that of the
// proxy which gave it out. There is at least one.
func Telling(records []flow.Record) flow.Record {
	for _, r := range records {
		if r.Verdict != flow.Passed {
			return r
		}
	}
	return records[0]
}

// Recount explains a record by itself, as far as it can be without asking anybody.
func Recount(r flow.Record, trustDomain string, now time.Time) Explanation {
	e := Explanation{Position: r.Plan, Records: []flow.Record{r}, Access: Access{Rule: -1, Reason: r.Decision}}
	source, destination := flow.Short(r.Source, trustDomain), flow.Short(r.Destination, trustDomain)
	fact := func(mark, format string, args ...any) {
		e.Facts = append(e.Facts, Fact{Mark: mark, Text: fmt.Sprintf(format, args...)})
	}
	what := source + " → " + destination
	if r.Kind == flow.HTTP && r.Method != "" {
		what += " " + r.Method + " " + r.Path
	}
	where := "the caller's proxy"
	if r.Direction == flow.Inbound {
		where = "the destination's proxy"
	}
	fact(FactOK, "%s at %s (%s ago), id %s", what, r.Time.UTC().Format(time.RFC3339), age(now.Sub(r.Time)), r.ErrorID)
	caller := "nobody that could prove who it is"
	if !r.Source.IsZero() {
		caller = r.Source.String()
	}
	if r.Peer != "" {
		caller += ", from " + r.Peer
	}
	fact(FactOK, "caller: %s", caller)
	node := ""
	if r.Node != "" {
		node = " on node " + r.Node
	}
	fact(FactOK, "seen by %s%s, under plan %d", where, node, r.Plan.Revision)
	switch r.Verdict {
	case flow.Denied:
		e.Verdict = "DENIED by policy"
		e.Access.Text = deniedText(r, source, destination)
		fact(FactFail, "%s", e.Access.Text)
		if !r.Source.IsZero() && !r.Destination.IsZero() {
			e.Next = append(e.Next, fmt.Sprintf("meshctl intention allow %s %s%s", source, destination, httpFlag(r)))
		}
	case flow.Refused:
		e.Verdict = "REFUSED on the mesh port: " + r.Reason
		fact(FactFail, "%s", reasonText(r))
		e.Next = append(e.Next, "call through a declared upstream of a host of this mesh; meshctl check on the caller's host")
	case flow.Passed:
		e.Verdict = "ANSWERED by the destination's proxy: " + r.Reason
		fact(FactFail, "the proxy of instance %s of %s answered with %d, %s; it knows why", r.Endpoint, destination, r.Status, r.Reason)
		e.Next = append(e.Next, "meshctl explain id:"+r.ErrorID+", through a server, or with --local on the host of instance "+r.Endpoint)
	default:
		e.Verdict = "FAILED: " + r.Reason
		fact(FactFail, "%s", reasonText(r))
		e.Next = append(e.Next, failedNext(r, destination)...)
	}
	return e
}

func age(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	return d.Round(time.Second).String()
}

// httpFlag allows exactly the request of the record, if all of it is known.
func httpFlag(r flow.Record) string {
	if r.Kind != flow.HTTP || r.Method == "" || r.Path == "" || len(r.Path) >= flow.MaxPath || len(r.Method) >= flow.MaxMethod {
		return ""
	}
	return fmt.Sprintf(" --http %q", r.Method+" "+r.Path)
}

// deniedText says which intention denied, in the words that a proxy's record has.
func deniedText(r flow.Record, source, destination string) string {
	head := "intention " + r.Intention
	switch {
	case r.Reason == "policy-changed": // what was decided before allowed it
		return fmt.Sprintf("it was allowed, and was cut when plan %d denied it", r.Plan.Revision)
	case r.Reason == "untrusted":
		return "the certificate authority of the caller is trusted no more"
	case r.Decision == "action":
		return head + " denies"
	case r.Decision == "rule" && r.Rule != nil:
		return fmt.Sprintf("%s, rule %d, denies", head, *r.Rule+1)
	case r.Decision == "no-rule-matched":
		return fmt.Sprintf("%s: none of its rules matches %s %s", head, r.Method, r.Path)
	case r.Decision == "expired":
		return head + " has expired, and no other covers the pair"
	case r.Decision == "port-not-covered":
		return fmt.Sprintf("%s does not cover port %s", head, r.Port)
	case r.Decision == "not-http":
		return head + " has HTTP rules, and the traffic is not HTTP"
	case r.Decision == "no-intention":
		return fmt.Sprintf("no intention allows %s to call %s", source, destination)
	case r.Cause != "":
		return r.Cause
	case r.Decision != "":
		return r.Decision
	default:
		return fmt.Sprintf("policy denies %s to call %s", source, destination)
	}
}

func reasonText(r flow.Record) string {
	text := r.Reason
	if r.Status != 0 {
		text += fmt.Sprintf(", answered with %d", r.Status)
	}
	if r.Endpoint != "" {
		text += ", instance " + r.Endpoint
	}
	if r.Cause != "" {
		text += ": " + r.Cause
	}
	return text
}

// failedNext says where to look.
func failedNext(r flow.Record, destination string) []string {
	switch r.Reason {
	case "no-healthy-instance", "connect-failed", "timeout":
		return []string{"meshctl instances " + destination + " -o wide", "meshctl check, on the hosts of both sides"}
	case "upstream-reset", "upstream-protocol":
		return []string{"look into the log of " + destination + ", instance " + r.Endpoint}
	case "bad-request", "request-timeout":
		return []string{"correct the client: docs/reference/errors.md says what is refused as HTTP"}
	case "overload":
		return []string{"meshctl top --dst " + destination, "raise the limits of the upstream in services.d"}
	case "no-leaf":
		return []string{"meshctl check, on node " + r.Node}
	default:
		return []string{"docs/reference/errors.md says what " + r.Reason + " means"}
	}
}
