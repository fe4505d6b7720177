package fleet

import "github.com/meshd/meshd/catalog"

// Spread returns what runs on each node.
func (f *Fleet) Spread() map[string][]catalog.Name {
	out := map[string][]catalog.Name{}
	for _, a := range f.agents {
		out[a.name] = f.local(a)
	}
	return out
}
