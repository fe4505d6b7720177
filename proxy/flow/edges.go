package flow

import (
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// Classes are what requests are counted by: the status / 100; 0 is a request that
// got no response.
const Classes = 6

// Sample is what one proxy process has counted since it began.
type Sample struct {
	Time time.Time `json:"time"`
	// Node is the host of the proxy.
	Node string `json:"node,omitempty"`
	// Session names the process: counters of two can't be compared.
	Session string `json:"session"`
	// Bounds are the upper ends of the histograms' buckets, in seconds; one more
	// bucket follows.
	Bounds []float64 `json:"bounds,omitempty"`
	Edges  []Edge    `json:"edges"`
}

// Edge is what passed between two services, as one side saw it.
type Edge struct {
	Direction   Direction `json:"direction"`
	Source      spiffe.ID `json:"source,omitzero"`
	Destination spiffe.ID `json:"destination,omitzero"`
	// Requests counts by class of status.
	Requests [Classes]uint64 `json:"requests"`
	// Denied counts requests and connections. Requests has the requests, too.
	Denied uint64 `json:"denied,omitempty"`
	// Unsent counts requests that the caller's proxy answered with an error of its
	// own and sent nowhere, the denied left out. Requests has them, too.
	Unsent uint64 `json:"unsent,omitempty"`
	// DeniedRequests are those of Denied that were requests.
	DeniedRequests uint64 `json:"denied_requests,omitempty"`
	// Durations counts requests by bucket, each by itself.
	Durations []uint64 `json:"durations,omitempty"`
	// Sessions are TCP sessions so far, Open those that are open now.
	Sessions uint64 `json:"sessions,omitempty"`
	Open     int64  `json:"open,omitempty"`
	Sent     uint64 `json:"bytes_sent,omitempty"`
	Received uint64 `json:"bytes_received,omitempty"`
}
