package api

import (
	"fmt"
	"time"

	"github.com/meshd/meshd/server/client"
)

// readyAge is how long ago a leader must have been heard of at most.
const readyAge = 2 * time.Second

// health answers while the server lives, whatever it can do.
func (a *API) health(*call) (any, error) { return map[string]string{"status": "ok"}, nil }

// ready answers while the server can do what it is for: it has the state, and knows
// a leader that takes writes.
func (a *API) ready(*call) (any, error) {
	select {
	case <-a.cfg.State.Ready():
	default:
		return nil, &client.Error{Code: client.CodeUnavailable, Message: "the state is not loaded yet"}
	}
	if age := a.cfg.Age(); age > readyAge {
		return nil, &client.Error{
			Code: client.CodeUnavailable, Message: fmt.Sprintf("no leader was heard of for %s", age.Round(100*time.Millisecond)),
			Next: "meshctl members, on any server that answers",
		}
	}
	return map[string]string{"status": "ready"}, nil
}
