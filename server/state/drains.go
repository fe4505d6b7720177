package state

import (
	"time"

	"github.com/meshd/meshd/catalog"
)

// Drain is an operator's word that an instance, or all of a node, takes no new
// work. It is not the agent's, which registers as before.
type Drain struct {
	By     string    `json:"by"`
	Since  time.Time `json:"since"`
	Reason string    `json:"reason,omitempty"`
}

// Drained returns the operator's drain that an instance is under, its own or its
// node's, and the revision of the newer of the two. One that can't be read
// drains.
func (s *Snapshot) Drained(key catalog.InstanceKey) (drain Drain, revision uint64, ok bool) {
	node, ofNode := NodeDrains.Get(s, key.Node)
	own, ofInstance := InstanceDrains.Get(s, key)
	drain = node.Value
	if ofInstance {
		drain = own.Value
	}
	return drain, max(node.Revision, own.Revision), ofNode || ofInstance
}
