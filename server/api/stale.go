package api

import (
	"fmt"
	"strconv"
	"time"

	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

const (
	// defaultMaxStale is how old a stale answer may be unless the call says
	// otherwise.
	defaultMaxStale = 5 * time.Second
	// ageHeader tells how old a stale answer may be at most, in seconds.
	ageHeader = "Mesh-Stale-Age"
)

// fresh returns a state that covers every write acknowledged so far, or with
// ?stale=true what this server has, unless that is older than ?max_stale.
func (a *API) fresh(c *call) (*state.Snapshot, error) {
	q := c.URL.Query()
	if q.Get("stale") != "true" {
		if q.Has("max_stale") {
			return nil, badField("max_stale", "it goes with stale=true")
		}
		return a.cfg.State.Fresh(c.Context())
	}
	limit := defaultMaxStale
	if text := q.Get("max_stale"); text != "" {
		var err error
		if limit, err = time.ParseDuration(text); err != nil || limit < 0 {
			return nil, badField("max_stale", "%q is no duration such as 5s", text)
		}
	}
	// The age is read first: the state can only get newer in between.
	age := a.cfg.Age()
	s := a.cfg.State.Snapshot()
	if age > limit {
		return nil, &client.Error{
			Code:    client.CodeUnavailable,
			Message: fmt.Sprintf("the state of this server may be %s old, and %s is allowed", age.Round(100*time.Millisecond), limit),
			Next:    "ask another server, or allow more with max_stale",
		}
	}
	c.out.Header().Set(ageHeader, strconv.FormatFloat(age.Seconds(), 'f', 3, 64))
	return s, nil
}
