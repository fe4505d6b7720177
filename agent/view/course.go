package view

import (
	"encoding/json"
	"math/rand/v2"
	"net"
	"slices"
	"time"
)

// failureMemory is how long a server that could not be used is tried after those of
// which nothing bad is known.
const failureMemory = 30 * time.Second

// course chooses the server of each attempt: a random one, and none twice before all
// were tried. It is not safe for concurrent use; its zero value is ready.
type course struct {
	tried  map[string]bool // in this round
	failed map[string]time.Time
}

// next returns the server to try now; "" if there is none. again says that every
// server was tried in vain since it last said so.
//
// Servers that the mesh has told come before those of the configuration, which may
// name the same ones differently, or none that are still there; and those that failed
// a moment ago come last of all.
func (c *course) next(told, configured []string, now time.Time) (server string, again bool) {
	all := slices.Concat(told, configured)
	if len(all) == 0 {
		return "", true
	}
	if !slices.ContainsFunc(all, func(s string) bool { return !c.tried[s] }) {
		clear(c.tried)
		again = true
	}
	var ranks [3][]string
	for i, s := range all {
		rank := 0
		switch at, failed := c.failed[s]; {
		case c.tried[s] || slices.Contains(all[:i], s):
			continue
		case failed && now.Sub(at) < failureMemory:
			rank = 2
		case i >= len(told):
			rank = 1
		}
		ranks[rank] = append(ranks[rank], s)
	}
	for _, rank := range ranks {
		if len(rank) > 0 {
			return rank[rand.IntN(len(rank))], again //nolint:gosec // spreads load, guards nothing
		}
	}
	return "", again // not reached: some server was not tried
}

// begin lets any server be the next.
func (c *course) begin() { clear(c.tried) }

// end notes that a server could not be used, or not any more.
func (c *course) end(server string, welcomed bool, now time.Time) {
	if c.tried == nil {
		c.tried, c.failed = map[string]bool{}, map[string]time.Time{}
	}
	if welcomed {
		clear(c.tried)
	}
	for s, at := range c.failed {
		if now.Sub(at) >= failureMemory {
			delete(c.failed, s)
		}
	}
	c.tried[server], c.failed[server] = true, now
}

// told returns where the servers are, as they say. An address that can't be one is left
// out.
func told(s *Snapshot) []string {
	var out []string
	for _, data := range s.Items(Servers()) {
		var server struct {
			Address string `json:"address"`
		}
		if json.Unmarshal(data, &server) != nil {
			continue
		}
		if host, port, err := net.SplitHostPort(server.Address); err == nil && host != "" && port != "" {
			out = append(out, server.Address)
		}
	}
	return out
}
