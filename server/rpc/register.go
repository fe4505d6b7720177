package rpc

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	strict "github.com/go-json-experiment/json"
	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// Costs of a transaction: a record that is read is one check, one that is written
// one more operation.
const (
	opsPerNode     = 4 // the node's record, identity and lease, the namespace
	opsPerService  = 2
	opsPerInstance = 4 // instance and status
	// chunkBytes leaves room for keys and for the records of the node.
	chunkBytes = store.MaxBytes - 32<<10
)

// registration is one of a request, understood.
type registration struct {
	key      catalog.InstanceKey
	service  catalog.Service
	instance catalog.Instance
	raw      *meshpb.Registration
}

// Register implements meshpb.MeshServer. Each instance is written whole (service,
// instance, status) or not at all, and only if it differs; the instances of one
// service together, as far as a transaction can hold them.
func (s *Server) Register(ctx context.Context, req *meshpb.RegisterRequest) (*meshpb.RegisterResponse, error) {
	c, err := s.authenticate(ctx, acl.Register)
	if err != nil {
		return nil, err
	}
	if n := len(req.GetRegistrations()); n > maxRegistrations {
		return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "%d instances on node %s, at most %d can be registered", n, c.node, maxRegistrations)
	}
	if err := s.holds(s.state.Snapshot(), c.node, req.GetSession()); err != nil {
		return nil, err
	}
	response := &meshpb.RegisterResponse{}
	var wanted map[catalog.Name][]registration
	var keep map[catalog.InstanceKey]bool
	s.pace.do(func() { wanted, keep, response.Refusals = understand(c.node, req.GetRegistrations()) })
	for _, service := range slices.SortedFunc(maps.Keys(wanted), catalog.Name.Compare) {
		for chunk := range chunks(wanted[service]) {
			refusals, err := s.registerChunk(ctx, c, req.GetSession(), chunk, keep)
			if err != nil {
				return nil, s.storeError(err, "register "+service.Short()+" of node "+c.node)
			}
			response.Refusals = append(response.Refusals, refusals...)
		}
	}
	var late error
	err = removeInstances(ctx, s.state, c.node, func(r state.Reader, key catalog.InstanceKey) bool {
		late = s.holds(r, c.node, req.GetSession())
		return late == nil && !keep[key]
	})
	if err := cmp.Or(err, late); err != nil {
		return nil, s.storeError(err, "remove old instances of node "+c.node)
	}
	response.Position = toWire(s.state.Snapshot().Position())
	return response, nil
}

// holds refuses a session that does not hold the lease of its node: what it had sent
// before the node left, or before its successor connected, comes too late. r may be a
// transaction, which then depends on the lease.
func (s *Server) holds(r state.Reader, node, session string) error {
	if session == "" {
		return nil // an agent that does not say it yet
	}
	switch lease, ok := state.Leases.Get(r, node); {
	case !ok:
		return s.refuse(codes.Aborted, meshpb.ReasonLeft, "node %s has left: open a stream to be in the mesh again", node)
	case lease.Err == nil && lease.Value.Session != session:
		return s.refuse(codes.Aborted, meshpb.ReasonSuperseded, "another agent of node %s has connected since", node)
	}
	return nil
}

// understand sorts what a node registers by service, and notes what is to be kept of
// its instances; the rest is refused.
func understand(node string, all []*meshpb.Registration) (wanted map[catalog.Name][]registration, keep map[catalog.InstanceKey]bool, refusals []*meshpb.Refusal) {
	wanted, keep = make(map[catalog.Name][]registration), make(map[catalog.InstanceKey]bool)
	for i, raw := range all {
		r, err := parseRegistration(node, raw)
		if err == nil && keep[r.key] {
			err = fmt.Errorf("instance %s of %s is there twice: give each an id", r.key.ID, r.key.Service.Short())
		}
		if err != nil {
			refusals = append(refusals, refusal(r, i, err))
			continue
		}
		keep[r.key] = true
		wanted[r.key.Service] = append(wanted[r.key.Service], r)
	}
	return wanted, keep, refusals
}

// parseRegistration reads leniently: a newer agent may say more than we know. What
// it says is stored as it is.
func parseRegistration(node string, raw *meshpb.Registration) (registration, error) {
	r := registration{raw: raw}
	if err := unambiguous(raw.GetInstance(), &r.instance); err != nil {
		return r, fmt.Errorf("instance: %w", err)
	}
	r.key = r.instance.Key()
	if err := unambiguous(raw.GetService(), &r.service); err != nil {
		return r, fmt.Errorf("service: %w", err)
	}
	var health catalog.InstanceStatus
	if err := unambiguous(raw.GetStatus(), &health); err != nil {
		return r, fmt.Errorf("status: %w", err)
	}
	if err := r.instance.Validate(); err != nil {
		return r, fmt.Errorf("instance: %w", err)
	}
	if err := r.service.Validate(); err != nil {
		return r, fmt.Errorf("service: %w", err)
	}
	if r.instance.Node != node {
		return r, fmt.Errorf("the instance is on node %s, and this is node %s", r.instance.Node, node)
	}
	if r.service.Ref() != r.instance.Ref() {
		return r, fmt.Errorf("an instance of %s comes with service %s", r.instance.Ref(), r.service.Ref())
	}
	if size := len(raw.GetInstance()) + len(raw.GetService()) + len(raw.GetStatus()); size > chunkBytes {
		return r, fmt.Errorf("%d bytes, at most %d fit: shorten meta, tags or check outputs", size, chunkBytes)
	}
	return r, nil
}

var errAmbiguous = errors.New("a field is there twice, or in another spelling than lower case")

// unambiguous reads JSON that every reader understands alike. Unknown fields pass, as
// a newer agent may send them, but a field in two spellings does not: what was checked
// here must be what other agents read.
func unambiguous[V any](raw []byte, into *V) error {
	if err := json.Unmarshal(raw, into); err != nil {
		return err //nolint:wrapcheck // the caller says what was read
	}
	var exact V
	if err := strict.Unmarshal(raw, &exact); err != nil {
		return fmt.Errorf("%w: %w", errAmbiguous, err)
	}
	folded, err := json.Marshal(into)
	if err != nil {
		return err //nolint:wrapcheck // the caller says what was read
	}
	asWritten, err := json.Marshal(exact)
	if err != nil {
		return err //nolint:wrapcheck // the caller says what was read
	}
	if !bytes.Equal(folded, asWritten) {
		return errAmbiguous
	}
	return nil
}

// chunks cuts the instances of one service into what a transaction holds.
func chunks(all []registration) func(yield func([]registration) bool) {
	const most = (store.MaxKeys - opsPerNode - opsPerService) / opsPerInstance
	return func(yield func([]registration) bool) {
		for len(all) > 0 {
			n, size := 0, 0
			for n < min(most, len(all)) {
				size += len(all[n].raw.GetInstance()) + len(all[n].raw.GetStatus())
				if n == 0 {
					size += len(all[n].raw.GetService())
				}
				if n > 0 && size > chunkBytes {
					break
				}
				n++
			}
			if !yield(all[:n]) {
				return
			}
			all = all[n:]
		}
	}
}

// registerChunk writes instances of one service. What is refused for want of
// permission is taken out of keep, so that an older registration goes too; what
// is refused for another reason leaves the older one in force.
func (s *Server) registerChunk(ctx context.Context, c caller, session string, chunk []registration, keep map[catalog.InstanceKey]bool) ([]*meshpb.Refusal, error) {
	var refused []error // in the order of chunk
	permitted := true
	_, err := s.state.Update(ctx, func(tx *state.Tx) error {
		if err := s.admit(tx, c); err != nil {
			return err
		}
		if err := s.holds(tx, c.node, session); err != nil {
			return err
		}
		name := chunk[0].key.Service
		node, _ := state.Nodes.Get(tx, c.node)
		if permitted = node.Err == nil && node.Value.MayRun(name); !permitted {
			refused = slices.Repeat([]error{fmt.Errorf("node %s may not run %s: add it to the services of the node", c.node, name.Short())}, len(chunk))
			return nil
		}
		refused = agree(tx, chunk)
		for i, r := range chunk {
			if refused[i] != nil {
				continue
			}
			if err := state.Instances.PutRaw(tx, r.key, r.raw.GetInstance()); err != nil {
				return fmt.Errorf("instance %s: %w", r.key, err)
			}
			if err := state.InstanceStatuses.PutRaw(tx, r.key, r.raw.GetStatus()); err != nil {
				return fmt.Errorf("status of %s: %w", r.key, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err //nolint:wrapcheck // made into a gRPC status by the caller, or one already
	}
	var out []*meshpb.Refusal
	for i, r := range chunk {
		if !permitted {
			delete(keep, r.key)
		}
		if refused[i] != nil {
			out = append(out, refusal(r, i, refused[i]))
		}
	}
	return out, nil
}

// agree returns, for each definition, in what it differs from the central service,
// which is created from the first one if there is none. Namespaces are never
// created so: a mistyped one is an error.
func agree(tx *state.Tx, chunk []registration) []error {
	name := chunk[0].key.Service
	if err := namespaceExists(tx, name.Namespace); err != nil {
		return slices.Repeat([]error{err}, len(chunk))
	}
	central, exists := state.Services.Get(tx, name)
	if !exists {
		if err := state.Services.PutRaw(tx, name, chunk[0].raw.GetService()); err != nil {
			return slices.Repeat([]error{fmt.Errorf("create the service: %w", err)}, len(chunk))
		}
		central.Value = chunk[0].service
	}
	if central.Err != nil {
		return slices.Repeat([]error{fmt.Errorf("service %s can't be read by this server: %w", name.Short(), central.Err)}, len(chunk))
	}
	out := make([]error, len(chunk))
	for i, r := range chunk {
		if err := central.Value.Agrees(r.service); err != nil {
			out[i] = fmt.Errorf("service %s: %w", name.Short(), err)
		}
	}
	return out
}

func namespaceExists(tx *state.Tx, namespace string) error {
	if _, ok := state.Namespaces.Get(tx, namespace); ok {
		return nil
	}
	var known []string
	for name := range state.Namespaces.All(tx) {
		known = append(known, name)
	}
	hint := ""
	if c := catalog.Closest(namespace, known); c != "" {
		hint = fmt.Sprintf(" (did you mean %q?)", c)
	}
	return fmt.Errorf("namespace %s does not exist%s: create it first", namespace, hint)
}

// removeInstances removes those instances of a node, with their status, of which gone
// says so. It asks twice: on the newest snapshot, and in the transaction
// that removes, which depends on what gone reads.
func removeInstances(ctx context.Context, st *state.State, node string, gone func(state.Reader, catalog.InstanceKey) bool) error {
	// Two records of two operations each, and the few that gone reads.
	const most = (store.MaxKeys - opsPerNode) / opsPerInstance
	snapshot := st.Snapshot()
	var keys []catalog.InstanceKey
	for key := range snapshot.InstancesOn(node) {
		if gone(snapshot, key) {
			keys = append(keys, key)
		}
	}
	for chunk := range slices.Chunk(keys, most) {
		_, err := st.Update(ctx, func(tx *state.Tx) error {
			for _, key := range chunk {
				if gone(tx, key) {
					state.Instances.Delete(tx, key)
					state.InstanceStatuses.Delete(tx, key)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("remove instances of node %s: %w", node, err)
		}
	}
	return nil
}

func refusal(r registration, index int, err error) *meshpb.Refusal {
	out := &meshpb.Refusal{Reason: strings.ToValidUTF8(err.Error(), "\uFFFD")}
	if r.instance.Service != "" {
		out.Service, out.Instance = r.key.Service.String(), r.key.ID
	} else {
		out.Instance = fmt.Sprintf("registration %d", index)
	}
	return out
}

// Leave implements meshpb.MeshServer.
func (s *Server) Leave(ctx context.Context, _ *meshpb.LeaveRequest) (*meshpb.LeaveResponse, error) {
	c, err := s.authenticate(ctx, acl.Leave)
	if err != nil {
		return nil, err
	}
	if err := removeInstances(ctx, s.state, c.node, func(state.Reader, catalog.InstanceKey) bool { return true }); err != nil {
		return nil, s.storeError(err, "remove the instances of node "+c.node)
	}
	at, err := s.state.Update(ctx, func(tx *state.Tx) error {
		state.Leases.Delete(tx, c.node)
		return nil
	})
	if err != nil {
		return nil, s.storeError(err, "end the lease of node "+c.node)
	}
	// What was registered between the two is there yet; nothing can be since.
	err = removeInstances(ctx, s.state, c.node, func(r state.Reader, _ catalog.InstanceKey) bool {
		_, back := state.Leases.Get(r, c.node)
		return !back
	})
	if err != nil {
		return nil, s.storeError(err, "remove the instances of node "+c.node)
	}
	s.leases.forget(c.node)
	s.fleet.close(c.node, s.refuse(codes.Aborted, meshpb.ReasonLeft, "node %s has left", c.node))
	return &meshpb.LeaveResponse{Position: toWire(at)}, nil
}
