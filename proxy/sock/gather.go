package sock

// gather is what is left of a write of several parts.
type gather struct {
	parts [3][]byte
	vectors
}

func (g *gather) left() bool { return len(g.parts[0])+len(g.parts[1])+len(g.parts[2]) > 0 }

// drop takes n bytes off the front.
func (g *gather) drop(n int) {
	for i := range g.parts {
		m := min(n, len(g.parts[i]))
		g.parts[i] = g.parts[i][m:]
		n -= m
	}
}

// clear forgets the memory of the parts.
func (g *gather) clear() { *g = gather{} }
