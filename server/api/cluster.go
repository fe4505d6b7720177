package api

import (
	"context"
	"net/http"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
)

// Cluster is the servers, as the API shows and changes them. Errors are
// *client.Error, or what every route may fail with.
type Cluster interface {
	// Members are the servers by name. With ask each is asked for what it knows of
	// itself, which takes two seconds where one does not answer.
	Members(ctx context.Context, ask bool) []client.Member
	// Transfer hands the leadership to the server called name, "" being the most up
	// to date, and returns who leads then, "" if that is not known yet.
	Transfer(ctx context.Context, name string) (leader string, err error)
	// Remove takes the server called name out of the cluster for good.
	Remove(ctx context.Context, name string) (client.Member, error)
}

// clusterRoutes are about the servers themselves.
func (a *API) clusterRoutes() []route {
	return []route{
		{http.MethodGet, "/v1/members", acl.Read, acl.Operator, nil, a.members, 0},
		{http.MethodPost, "/v1/operator/raft/transfer", acl.Write, acl.Operator, nil, a.transfer, 0},
		{http.MethodDelete, "/v1/operator/raft/servers/{name}", acl.Write, acl.Operator, nil, a.removeServer, 0},
	}
}

func (a *API) members(c *call) (any, error) {
	return client.Members{Members: a.cfg.Cluster.Members(c.Context(), true), Held: a.cfg.Fleet.Held()}, nil
}

func (a *API) transfer(c *call) (any, error) {
	var req client.TransferRequest
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	if len(raw) > 0 {
		if err := decodeBody("transfer", raw, &req); err != nil {
			return nil, err
		}
	}
	leader, err := a.cfg.Cluster.Transfer(c.Context(), req.To)
	if err != nil {
		return nil, err //nolint:wrapcheck // as the interface says
	}
	return client.Transferred{Leader: leader}, nil
}

func (a *API) removeServer(c *call) (any, error) {
	removed, err := a.cfg.Cluster.Remove(c.Context(), c.PathValue("name"))
	if err != nil {
		return nil, err //nolint:wrapcheck // as the interface says
	}
	return removed, nil
}
