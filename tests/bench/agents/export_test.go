package agents

import "github.com/meshd/meshd/catalog"

// Spread returns what runs on each node.
func (m *Mesh) Spread() map[string][]catalog.Name {
	out := map[string][]catalog.Name{}
	for i := range m.size.Agents {
		out[node(i)] = m.local(i)
	}
	return out
}
