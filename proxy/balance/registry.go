package balance

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
// and new ones for the rest. The receiver stays as it is, for a plan that is refused after all. The zero Registry is empty.
func (r Registry) Next(keys []Key) Registry {
	next := make(map[Key]*State, len(keys))
	for _, k := range keys {
		if s, ok := r.states[k]; ok {
			next[k] = s
		} else if next[k] == nil {
			next[k] = new(State)
		}
	}
	return Registry{states: next}
}

// State returns the state under key, nil if the plan has no such endpoint.
func (r Registry) State(key Key) *State { return r.states[key] }
