package state

import (
	"slices"
	"time"
)

// Server is what a server says of itself, and what operators said of it. It is
// kept under the server's name.
type Server struct {
	// ID is the member of the replicated store that runs under the name: the name
	// and the instance of its state directory; empty when it was removed.
	ID string `json:"id"`
	// Address is host:port for agents and clients, PeerAddress that for the other
	// servers; empty for a server that is alone for ever.
	Address     string `json:"address"`
	PeerAddress string `json:"peer_address,omitempty"`
	Version     string `json:"version"`
	// FeatureLevel is the newest catalog.FeatureLevel that it knows.
	FeatureLevel int       `json:"feature_level"`
	Started      time.Time `json:"started"`
	// NonVoter says that it is not to get a vote.
	NonVoter bool `json:"non_voter,omitempty"`
	// Removed are the IDs under which an operator has taken servers of this name
	// out of the cluster: they are not let in again.
	Removed []string `json:"removed,omitempty"`
}

// Addresses returns host:port of every server for agents and clients, in order.
func (s *Snapshot) Addresses() []string {
	var out []string
	for _, server := range Servers.All(s) {
		if server.Err == nil && server.Value.Address != "" {
			out = append(out, server.Value.Address)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
