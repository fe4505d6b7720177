// Package flow is the vocabulary of what can be seen in the mesh while it
// happens: records of requests and connections, the queries that select them,
// and the counters of each pair of services. mesh-proxy makes them, agents and
// servers pass them on, meshctl shows them.
//
// A record holds what a line of the access log holds, and no more: no header, no
// query string.
package flow

import (
	"strings"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// Bounds of what a record holds, in bytes; longer text is cut.
const (
	MaxPath   = 256
	MaxHost   = 128
	MaxMethod = 32
	MaxCause  = 256
)

// Kind is what a record tells of.
type Kind string

// The kinds.
const (
	HTTP Kind = "http" // a request
	TCP  Kind = "tcp"  // a connection, or one that was refused
)

// Direction is the side of the mesh that saw it.
type Direction string

// The directions.
const (
	Outbound Direction = "outbound" // the caller's proxy
	Inbound  Direction = "inbound"  // the destination's proxy
)

// Verdict is what became of a request or connection, as the proxy that recorded
// it knows.
type Verdict string

// The verdicts.
const (
	// Passed: it was carried, whatever the application answered.
	Passed Verdict = "passed"
	// Denied: an intention denies it, none allows it, or none does any more.
	Denied Verdict = "denied"
	// Refused: on the mesh port the caller did not prove who it is.
	Refused Verdict = "refused"
	// Failed: the proxy itself answered with another error, or reset.
	Failed Verdict = "failed"
)

// Record is one request or connection. Members without a value are absent in
// JSON.
type Record struct {
	// Time is when it began.
	Time      time.Time `json:"time"`
	Kind      Kind      `json:"kind"`
	Direction Direction `json:"direction"`
	Verdict   Verdict   `json:"verdict"`
	// Opened says that a TCP session begins; another record follows at its end.
	Opened bool `json:"opened,omitempty"`
	// Node is the host on which it was seen.
	Node string `json:"node,omitempty"`
	// Source and Destination are identities; a caller that did not prove who it is
	// has none.
	Source      spiffe.ID `json:"source,omitzero"`
	Destination spiffe.ID `json:"destination,omitzero"`
	// Port is the destination's, by name. Endpoint is the instance: the one that
	// was picked, or on the destination's host the local one.
	Port     string `json:"port,omitempty"`
	Endpoint string `json:"endpoint,omitempty"`
	// Peer is the address of the side that opened the connection.
	Peer string `json:"peer,omitempty"`
	// Method, Authority and Path are normalized, as the policy was shown them.
	Method    string `json:"method,omitempty"`
	Authority string `json:"authority,omitempty"`
	Path      string `json:"path,omitempty"`
	// Status is what the client was sent; 0 if it got no response.
	Status int `json:"status,omitempty"`
	// GRPC is the status of a request of gRPC, for example "NOT_FOUND"; "none" if there was none.
	GRPC string `json:"grpc_status,omitempty"`
	// Sent is from source to destination, Received the way back.
	Sent     int64 `json:"bytes_sent"`
	Received int64 `json:"bytes_received"`
	// DurationMS is from the first byte of a request to the last of its response,
	// or from the accept of a connection to its end.
	DurationMS float64 `json:"duration_ms"`
	// Reason is why it failed: a mesh-error, or the reason of a connection.
	Reason string `json:"reason,omitempty"`
	// Cause says it in words.
	Cause string `json:"cause,omitempty"`
	// Decision is the reason of the policy's decision, Intention the one that
	// decided, Rule the index of its rule.
	Decision  string `json:"decision,omitempty"`
	Intention string `json:"intention,omitempty"`
	Rule      *int   `json:"rule,omitempty"`
	// ErrorID is what the client was told as mesh-error-id, by this proxy or, where
	// the verdict is Passed, by the destination's. A connection has one, too, if it
	// was not carried, although nobody could tell its client.
	ErrorID string `json:"error_id,omitempty"`
	// Plan is the position of the plan that was in force.
	Plan catalog.Position `json:"plan,omitzero"`
}

// Seen is what a Filter looks at. It is made of views, so that no record has to be
// made of what nobody asked for.
type Seen struct {
	Direction           Direction
	Verdict             Verdict
	Source, Destination spiffe.ID
	Method, Path        []byte
	Status              int
	// Told says that the client was told an ErrorID.
	Told bool
}

// Seen returns what a Filter looks at.
func (r *Record) Seen() Seen {
	return Seen{
		Direction: r.Direction, Verdict: r.Verdict, Source: r.Source, Destination: r.Destination,
		Method: []byte(r.Method), Path: []byte(r.Path), Status: r.Status, Told: r.ErrorID != "",
	}
}

// Bound cuts what a record of another host holds beyond the bounds.
func (r *Record) Bound() {
	for text, limit := range map[*string]int{
		(*string)(&r.Kind): 8, (*string)(&r.Direction): 8, (*string)(&r.Verdict): 8, &r.Port: 63, &r.Endpoint: MaxHost, &r.Peer: MaxHost,
		&r.Method: MaxMethod, &r.Authority: MaxHost, &r.Path: MaxPath, &r.Reason: MaxHost, &r.Cause: MaxCause, &r.Decision: MaxHost,
		&r.Intention: 2 * MaxCause, &r.ErrorID: 6,
	} {
		if len(*text) > limit {
			*text = strings.Clone((*text)[:limit])
		}
	}
}

// Own is the service of the pair on whose behalf the proxy acts that recorded it.
func (r *Record) Own() spiffe.ID { return own(r.Direction, r.Source, r.Destination) }

// Own is as that of a Record.
func (e *Edge) Own() spiffe.ID { return own(e.Direction, e.Source, e.Destination) }

func own(d Direction, source, destination spiffe.ID) spiffe.ID {
	if d == Outbound {
		return source
	}
	return destination
}

// Service is the name of a service's identity; zero of any other.
func Service(id spiffe.ID) catalog.Name {
	if id.Kind != spiffe.KindService {
		return catalog.Name{}
	}
	return catalog.Name{Namespace: id.Namespace, Name: id.Name}
}

// Short is an identity as people write it: the name of a service of the trust
// domain, another's SPIFFE ID, and "?" of nobody.
func Short(id spiffe.ID, trustDomain string) string {
	switch {
	case id.IsZero():
		return "?"
	case id.Kind == spiffe.KindService && (trustDomain == "" || id.TrustDomain == trustDomain):
		return Service(id).Short()
	default:
		return id.String()
	}
}

// ValidID reports whether s has the form of an error's identifier: six
// hexadecimal digits, in lower case.
func ValidID(s string) bool {
	return len(s) == 6 && strings.Trim(s, "0123456789abcdef") == ""
}
