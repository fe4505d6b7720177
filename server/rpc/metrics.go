package rpc

import (
	"sync/atomic"
	"time"
)

// delayBounds are the upper bounds of the buckets of Metrics.Delays.
var delayBounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond,
	5 * time.Second, 10 * time.Second,
}

// delays is a histogram. Its zero value is empty.
type delays struct {
	buckets [len(delayBounds) + 1]atomic.Uint64
	sum     atomic.Int64
}

func (d *delays) add(took time.Duration) {
	i := 0
	for i < len(delayBounds) && took > delayBounds[i] {
		i++
	}
	d.buckets[i].Add(1)
	d.sum.Add(int64(took))
}

// Metrics is what a server tells of its agents' streams at one moment.
type Metrics struct {
	// Streams are connected agents; Waiting are those that wait for their turn to be
	// sent their first topics, and Syncing those whose turn it is.
	Streams, Waiting, Syncing int
	// Isolated says that agents are turned away for want of a majority of servers.
	Isolated bool
	// Lag is how long the change waits that was sent to some agent last of all, and
	// Behind how many revisions lie between that agent and the newest state; 0 when
	// every agent was sent all that concerns it.
	Lag    time.Duration
	Behind uint64
	// Delays is a histogram of the time from a change, as this server saw it, until it
	// was sent to one agent: Delays[bound] counts those of up to bound. Sent counts
	// all, and Took sums them up.
	Delays map[time.Duration]uint64
	Sent   uint64
	Took   time.Duration
}

// Metrics looks at all streams.
func (s *Server) Metrics() Metrics {
	now, newest := time.Now(), s.feeds.position()
	out := Metrics{
		Waiting: int(s.admission.waiting.Load()), Syncing: len(s.admission.turns), Isolated: s.isolated.Load(),
		Delays: make(map[time.Duration]uint64, len(delayBounds)), Took: time.Duration(s.feeds.delays.sum.Load()),
	}
	for _, st := range s.fleet.streams() {
		out.Streams++
		lag, told := st.behind(now)
		out.Lag = max(out.Lag, lag)
		if lag > 0 && told.Generation == newest.Generation && newest.Revision > told.Revision {
			out.Behind = max(out.Behind, newest.Revision-told.Revision)
		}
	}
	for i := range s.feeds.delays.buckets {
		out.Sent += s.feeds.delays.buckets[i].Load()
		if i < len(delayBounds) {
			out.Delays[delayBounds[i]] = out.Sent
		}
	}
	return out
}
