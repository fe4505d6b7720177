// Package disk_test breaks what servers and agents keep on disk, and the disk.
package disk_test

import (
	"maps"
	"slices"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
