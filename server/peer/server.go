package peer

import (
	"time"

	"github.com/meshd/meshd/server/store/raftstore"
)

// Server is one of a cluster.
type Server = raftstore.Server

// Member is one of a new cluster.
type Member = raftstore.Member

// Status is what a server knows of itself.
type Status struct {
	Version      string `json:"version"`
	FeatureLevel int    `json:"feature_level"`
	// Started is when this process began.
	Started time.Time `json:"started"`
	// Agents is how many are connected.
	Agents int `json:"agents"`
	// Generation and Revision are the position of its state, Applied is the entry of
	// the log that it has applied last.
	Generation string `json:"generation,omitempty"`
	Revision   uint64 `json:"revision,omitempty"`
	Applied    uint64 `json:"applied"`
	// ContactMS is for how long it has not known a majority behind the leader.
	ContactMS int64 `json:"contact_ms"`
	// HashAt and Hash are the newest verification mark that it has hashed its
	// state at; "" before the first.
	HashAt uint64 `json:"hash_at,omitempty"`
	Hash   string `json:"hash,omitempty"`
}
