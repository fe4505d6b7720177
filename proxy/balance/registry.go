package balance

import "time"

// Key names an endpoint's state over changes of plan. Restoring the store starts a new generation, in which the same names
// may mean other processes.
type Key struct {
	Generation, Cluster, Node, Instance string
}

// Registry keeps the states of the endpoints of the plan in force. It is for the one goroutine that applies plans.
type Registry struct {
	states map[Key]*State
}

// Next returns the registry of the next plan, which has the endpoints in keys: with the states of those that are here too,
// and new ones for the rest. A new endpoint of a cluster that is here too gets its share little by little from now on; those
// of a new cluster have nobody else to leave requests to. The receiver stays as it is, for a plan that is refused after all.
// The zero Registry is empty.
func (r Registry) Next(keys []Key, now time.Time) Registry {
	known := make(map[Key]bool)
	for k := range r.states {
		known[k.ofCluster()] = true
	}
	next := make(map[Key]*State, len(keys))
	for _, k := range keys {
		if s, ok := r.states[k]; ok {
			next[k] = s
		} else if next[k] == nil {
			next[k] = new(State)
			if known[k.ofCluster()] {
				next[k].start(now)
			}
		}
	}
	return Registry{states: next}
}

// ofCluster is what the keys of one cluster have in common.
func (k Key) ofCluster() Key { return Key{Generation: k.Generation, Cluster: k.Cluster} }

// State returns the state under key, nil if the plan has no such endpoint.
func (r Registry) State(key Key) *State { return r.states[key] }
