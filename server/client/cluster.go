package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/meshd/meshd/catalog"
)

// Members are the servers of the mesh.
type Members struct {
	Members []Member `json:"members"` // by name
	// Held are the nodes that fell silent together with more than half of all: none
	// of them is declared out of touch until they are back or released.
	Held []string `json:"held,omitempty"`
}

// Member is one server of the mesh.
type Member struct {
	Name string `json:"name"`
	// ID is that of the member of the store: a server that lost its state is another
	// one under the same name.
	ID string `json:"id"`
	// Address is host:port for the other servers; empty where there can be none.
	Address string `json:"address,omitempty"`
	// Voter counts for majorities; a new server has no vote before it has caught up.
	Voter  bool `json:"voter"`
	Leader bool `json:"leader"`

	Version      string    `json:"version"`
	FeatureLevel int       `json:"feature_level"`
	Started      time.Time `json:"started"`
	// Agents are those that hold their lease at it.
	Agents int `json:"agents"`
	// Position is how far its state has come, Applied the entry of the log that it
	// has applied last.
	Position catalog.Position `json:"position"`
	Applied  uint64           `json:"applied,omitempty"`
	// Contact is for how long it has not known a leader with a majority behind it, in
	// whole seconds.
	Contact catalog.Duration `json:"contact,omitzero"`
	// State compares its state with the leader's, as both were at one entry of the
	// log.
	State MemberState `json:"state,omitempty"`
	// Problem is why it did not tell of itself.
	Problem string `json:"problem,omitempty"`
}

// MemberState says whether a server has the leader's state.
type MemberState string

// The states; "" says that they have not been compared.
const (
	StateEqual     MemberState = "equal"
	StateDifferent MemberState = "different"
)

// TransferRequest asks for another leader.
type TransferRequest struct {
	To string `json:"to,omitempty"` // the name of a server; "": the most up to date
}

// Transferred tells who leads.
type Transferred struct {
	Leader string `json:"leader,omitempty"` // empty: not known yet
}

// Members returns the servers, each asked for what it knows of itself.
func (c *Client) Members(ctx context.Context) (Members, error) {
	var m Members
	return m, c.do(ctx, http.MethodGet, "/v1/members", nil, &m)
}

// Transfer hands the leadership to the server called name, "" being the most up to
// date.
func (c *Client) Transfer(ctx context.Context, name string) (Transferred, error) {
	var t Transferred
	return t, c.do(ctx, http.MethodPost, "/v1/operator/raft/transfer", TransferRequest{To: name}, &t)
}

// RemoveServer takes a server out of the cluster for good, and returns what it was.
func (c *Client) RemoveServer(ctx context.Context, name string) (Member, error) {
	var m Member
	return m, c.do(ctx, http.MethodDelete, "/v1/operator/raft/servers/"+url.PathEscape(name), nil, &m)
}
