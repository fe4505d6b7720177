package api

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

const (
	maxReason = 256
	// leaveChunk is how many instances of a node leave in one transaction.
	leaveChunk = 10
)

// drainRoutes take a node, or an instance, out of service and back.
func (a *API) drainRoutes() []route {
	node, instance := a.collection(client.KindNode), a.collection(client.KindInstance)
	onNode := "/v1/nodes" + node.pattern()
	onInstance := "/v1/instances" + instance.pattern() + "/drain"
	return []route{
		{http.MethodPut, onNode + "/drain", acl.Write, acl.Node, node.object, a.drain(node), 0},
		{http.MethodDelete, onNode + "/drain", acl.Write, acl.Node, node.object, a.undrain(node), 0},
		{http.MethodPost, onNode + "/leave", acl.Write, acl.Node, node.object, a.leave, 0},
		{http.MethodPut, onInstance, acl.Write, acl.Instance, instance.object, a.drain(instance), 0},
		{http.MethodDelete, onInstance, acl.Write, acl.Instance, instance.object, a.undrain(instance), 0},
	}
}

func (a *API) drain(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		raw, err := readBody(c)
		if err != nil {
			return nil, err
		}
		var req client.DrainRequest
		if len(raw) > 0 {
			if err := decodeBody("drain", raw, &req); err != nil {
				return nil, err
			}
		}
		if len(req.Reason) > maxReason {
			return nil, badField("reason", "has %d bytes; at most %d", len(req.Reason), maxReason)
		}
		d := state.Drain{By: c.who.String(), Since: a.cfg.Now().UTC(), Reason: req.Reason}
		return a.changeDrain(c, k, func(tx *state.Tx, key catalog.InstanceKey) (string, error) {
			old, is := drainOf(tx, key)
			if is && old.Value.Reason == req.Reason {
				return client.ChangeUnchanged, nil
			}
			if key.ID == "" {
				return client.ChangeDrained, state.NodeDrains.Put(tx, key.Node, d)
			}
			return client.ChangeDrained, state.InstanceDrains.Put(tx, key, d)
		})
	}
}

func (a *API) undrain(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		return a.changeDrain(c, k, func(tx *state.Tx, key catalog.InstanceKey) (string, error) {
			if _, is := drainOf(tx, key); !is {
				return client.ChangeUnchanged, nil
			}
			if key.ID == "" {
				state.NodeDrains.Delete(tx, key.Node)
			} else {
				state.InstanceDrains.Delete(tx, key)
			}
			return client.ChangeUndrained, nil
		})
	}
}

// drainOf reads the record of exactly what key names: a node where it has no ID.
func drainOf(r state.Reader, key catalog.InstanceKey) (state.Record[state.Drain], bool) {
	if key.ID == "" {
		return state.NodeDrains.Get(r, key.Node)
	}
	return state.InstanceDrains.Get(r, key)
}

// changeDrain changes the drain of the node or instance of the URL, which must
// exist.
func (a *API) changeDrain(c *call, k collection, change func(*state.Tx, catalog.InstanceKey) (string, error)) (any, error) {
	ref := client.Ref{Kind: k.kind(), Parts: k.parts(c.Request)}
	key := catalog.InstanceKey{Node: ref.Parts[0]}
	if k.kind() == client.KindInstance {
		key = catalog.InstanceKey{
			Service: catalog.Name{Namespace: ref.Parts[0], Name: ref.Parts[1]}, Node: ref.Parts[2], ID: ref.Parts[3],
		}
	}
	var out client.Result
	pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
		item, err := k.get(tx.Snapshot(), ref)
		if err != nil {
			return err
		}
		if item == nil {
			return missing(c, k, tx.Snapshot(), ref)
		}
		done, err := change(tx, key)
		out = client.Result{Changes: []client.Change{{Kind: k.kind(), Name: item.Name, Change: done}}}
		if key.ID == "" && done != client.ChangeUndrained {
			out.Warnings = lastOnes(tx.Snapshot(), key.Node)
		}
		return err
	})
	out.Position = pos
	return out, err
}

// lastOnes warns of services that have no healthy instance but on the node.
func lastOnes(s *state.Snapshot, node string) []string {
	var warnings []string
	seen := map[catalog.Name]bool{}
	for key := range s.InstancesOn(node) {
		if seen[key.Service] {
			continue
		}
		seen[key.Service] = true
		svc, ok := state.Services.Get(s, key.Service)
		if !ok || len(svc.Value.Ports) == 0 {
			continue // nobody calls it
		}
		elsewhere := false
		for other := range s.InstancesOf(key.Service) {
			st, stale := instanceState(s, other)
			elsewhere = elsewhere || other.Node != node && !stale && !st.Drain && st.Health.Usable()
		}
		if !elsewhere {
			warnings = append(warnings, fmt.Sprintf("service %s has no healthy instance on another node", key.Service.Short()))
		}
	}
	return warnings
}

// leave takes the instances of a node that is out of touch out of the catalog, as
// nobody else will: agents do not deregister when they stop, and a stale instance
// is used while there is no better one.
func (a *API) leave(c *call) (any, error) {
	node := c.PathValue("name")
	out := client.Result{Changes: []client.Change{}}
	for {
		var removed []client.Change
		pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
			removed = nil
			if _, ok := state.Nodes.Get(tx, node); !ok {
				return missing(c, a.collection(client.KindNode), tx.Snapshot(), client.Ref{Kind: client.KindNode, Parts: []string{node}})
			}
			if lease, ok := state.Leases.Get(tx, node); ok && !lease.Value.Lost {
				return &client.Error{
					Code: client.CodeConflict, Message: fmt.Sprintf("node %s is connected: its agent would register its instances again", node),
					Next: "stop its agent first, drain the node, or delete it to keep it out",
				}
			}
			for key := range tx.Snapshot().InstancesOn(node) {
				if len(removed) == leaveChunk {
					break
				}
				state.Instances.Delete(tx, key)
				state.InstanceStatuses.Delete(tx, key)
				name := strings.Join([]string{key.Service.Short(), key.Node, key.ID}, "/")
				removed = append(removed, client.Change{Kind: client.KindInstance, Name: name, Change: client.ChangeDeleted})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		out.Position, out.Changes = pos, slices.Concat(out.Changes, removed)
		if len(removed) < leaveChunk {
			return out, nil
		}
	}
}
