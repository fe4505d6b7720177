package state

// WithLevel returns a table whose values need a feature level.
func WithLevel[K comparable, V any](t *Table[K, V], level func(V) int) *Table[K, V] {
	copied := *t
	copied.level = level
	return &copied
}
