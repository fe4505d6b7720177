package api

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

var errParts = errors.New("the name has a wrong number of parts")

func want(parts []string, n int) error {
	if len(parts) != n {
		return fmt.Errorf("%w: %d, want %d", errParts, len(parts), n)
	}
	return nil
}

// collections lists every kind, in the order of client.Kinds.
func collections(trustDomain string) []collection {
	return []collection{namespaces(), nodes(), services(), instances(), intentionsOf(trustDomain), sets(), policies(), roles()}
}

func oneName(parts []string) (string, error) {
	if err := want(parts, 1); err != nil {
		return "", err
	}
	return parts[0], catalog.CheckLabel(parts[0])
}

func plain(s string) string { return s }

// named is the scope of what has a name and no namespace.
func named(name string) acl.Request { return acl.Request{Name: name} }

// scopeOfIntention is its destination, whose owner writes it. Its source, of this
// mesh, may read it too.
func scopeOfIntention(k intentions.Key) acl.Request {
	what := acl.Request{Namespace: k.DestinationNamespace, Name: k.Destination}
	if k.SourceTrustDomain == "" {
		what.SourceNamespace, what.Source = k.SourceNamespace, k.Source
	}
	return what
}

// mayGive demands that somebody may write the services that he lets a host run, as
// the host can act as any of them then.
func mayGive(who acl.Identity, patterns []string) error {
	for _, p := range patterns {
		what := acl.Request{Verb: acl.Write, Resource: acl.Service}
		if p != "*" {
			ns, name, has := strings.Cut(p, "/")
			if !has {
				ns, name = catalog.DefaultNamespace, p
			}
			what.Namespace, what.Name = ns, name
		}
		if err := acl.Authorize(who, what); err != nil {
			return fmt.Errorf("a host that may run %s can act as it: %w", p, err)
		}
	}
	return nil
}

func namespaces() collection {
	return &table[string, catalog.Namespace]{
		name: client.KindNamespace, res: acl.Namespace, segments: []string{"name"}, table: state.Namespaces,
		key:   oneName,
		keyOf: func(n catalog.Namespace) (string, error) { return n.Name, nil },
		ref:   func(k string) client.Ref { return client.Ref{Kind: client.KindNamespace, Parts: []string{k}} },
		show:  plain,
		scope: named,
		beforeRemove: func(tx *state.Tx, k string) error {
			for n := range state.Services.All(tx) {
				if n.Namespace != k {
					continue
				}
				if _, still := state.Services.Get(tx, n); still { // not deleted in this very transaction
					return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("namespace %s still has service %s", k, n), Next: "delete its services first"}
				}
			}
			for key := range state.Intentions.All(tx) {
				if key.DestinationNamespace != k {
					continue
				}
				if _, still := state.Intentions.Get(tx, key); still {
					return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("namespace %s still has intention %s", k, key), Next: "delete its intentions first"}
				}
			}
			return nil
		},
	}
}

func nodes() collection {
	return &table[string, catalog.Node]{
		name: client.KindNode, res: acl.Node, segments: []string{"name"}, table: state.Nodes,
		key:    oneName,
		keyOf:  func(n catalog.Node) (string, error) { return n.Name, nil },
		ref:    func(k string) client.Ref { return client.Ref{Kind: client.KindNode, Parts: []string{k}} },
		show:   plain,
		scope:  named,
		labels: func(n catalog.Node) map[string]string { return n.Labels },
		touched: func(_ *state.Snapshot, c state.Change) []string {
			if k, ok := state.NodeStatuses.Key(c); ok {
				return []string{k}
			}
			if k, ok := state.Leases.Key(c); ok {
				return []string{k}
			}
			if k, ok := state.NodeDrains.Key(c); ok {
				return []string{k}
			}
			if k, ok := state.Instances.Key(c); ok {
				return []string{k.Node}
			}
			return nil
		},
		status: func(s *state.Snapshot, k string) any {
			st := client.NodeStatus{State: "unknown"}
			if rec, ok := state.NodeStatuses.Get(s, k); ok {
				st.NodeStatus = rec.Value
				if !rec.Value.Joined.IsZero() {
					st.State = "left"
				}
			}
			if lease, ok := state.Leases.Get(s, k); ok {
				st.State, st.Since = "connected", lease.Value.Since
				if lease.Value.Lost {
					st.State = "stale"
				}
			}
			for range s.InstancesOn(k) {
				st.Instances++
			}
			_, st.Drain = state.NodeDrains.Get(s, k)
			return st
		},
		before: func(tx *state.Tx, who acl.Identity, _ string, n catalog.Node) ([]string, error) {
			return strangeNamespaces(tx, n.Services), mayGive(who, n.Services)
		},
	}
}

// strangeNamespaces warns of what a node may run in namespaces that nobody made.
func strangeNamespaces(r state.Reader, patterns []string) []string {
	var warnings []string
	for _, p := range patterns {
		ns, _, has := strings.Cut(p, "/")
		if !has || ns == catalog.DefaultNamespace {
			continue
		}
		if _, ok := state.Namespaces.Get(r, ns); ok {
			continue
		}
		text := fmt.Sprintf("it may run %s, and namespace %s does not exist", p, ns)
		if near := catalog.Closest(ns, namespaceNames(r)); near != "" {
			text += "; did you mean " + near + "?"
		}
		warnings = append(warnings, text)
	}
	return warnings
}

func services() collection {
	return &table[catalog.Name, catalog.Service]{
		name: client.KindService, res: acl.Service, segments: []string{"namespace", "name"}, table: state.Services,
		key: func(parts []string) (catalog.Name, error) {
			if err := want(parts, 2); err != nil {
				return catalog.Name{}, err
			}
			return catalog.ParseName(parts[0] + "/" + parts[1])
		},
		keyOf: func(s catalog.Service) (catalog.Name, error) { return s.Ref(), nil },
		ref: func(k catalog.Name) client.Ref {
			return client.Ref{Kind: client.KindService, Parts: []string{k.Namespace, k.Name}}
		},
		show:   catalog.Name.Short,
		scope:  func(k catalog.Name) acl.Request { return acl.Request{Namespace: k.Namespace, Name: k.Name} },
		status: func(s *state.Snapshot, k catalog.Name) any { return serviceStatus(s, k) },
		touched: func(s *state.Snapshot, c state.Change) []catalog.Name {
			var names []catalog.Name
			if k, ok := state.Instances.Key(c); ok {
				names = append(names, k.Service)
			}
			for _, k := range touchedInstances(s, c) {
				names = append(names, k.Service)
			}
			return names
		},
		before: func(tx *state.Tx, _ acl.Identity, k catalog.Name, s catalog.Service) ([]string, error) {
			if err := exists(tx, "namespace", k.Namespace); err != nil {
				return nil, err
			}
			old, ok := state.Services.Get(tx, k)
			if !ok || old.Err != nil {
				return nil, nil
			}
			shape := s.WithDefaults()
			for i := range shape.Ports {
				shape.Ports[i].Upgrade = false // how it is carried may change at any time
			}
			for i := range tx.Snapshot().InstancesOf(k) {
				if err := old.Value.Agrees(shape); err != nil {
					return nil, &client.Error{
						Code: client.CodeConflict, Message: fmt.Sprintf("service %s has instances (node %s): %v", k.Short(), i.Node, err),
						Next: "change the definitions on its nodes first, or give the new shape a new name",
					}
				}
				break
			}
			return nil, nil
		},
		beforeRemove: func(tx *state.Tx, k catalog.Name) error {
			for i := range tx.Snapshot().InstancesOf(k) {
				return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("service %s still has an instance on node %s", k.Short(), i.Node), Next: "remove its definition there first"}
			}
			return nil
		},
	}
}

// touchedInstances are those whose health or staleness a change may concern.
func touchedInstances(s *state.Snapshot, c state.Change) []catalog.InstanceKey {
	if k, ok := state.InstanceStatuses.Key(c); ok {
		return []catalog.InstanceKey{k}
	}
	if k, ok := state.InstanceDrains.Key(c); ok {
		return []catalog.InstanceKey{k}
	}
	node, ok := state.Leases.Key(c)
	if !ok {
		if node, ok = state.NodeDrains.Key(c); !ok {
			return nil
		}
	}
	var keys []catalog.InstanceKey
	for k := range s.InstancesOn(node) {
		keys = append(keys, k)
	}
	return keys
}

func serviceStatus(s *state.Snapshot, k catalog.Name) client.ServiceStatus {
	var st client.ServiceStatus
	for i := range s.InstancesOf(k) {
		st.Instances++
		health, stale := instanceState(s, i)
		switch {
		case !health.Health.Usable() || health.Drain:
		case stale:
			st.Stale++
		default:
			st.Healthy++
		}
	}
	return st
}

// instanceState returns an instance's health and whether its node is stale.
func instanceState(s *state.Snapshot, k catalog.InstanceKey) (catalog.InstanceStatus, bool) {
	st := catalog.InstanceStatus{Health: catalog.HealthUnknown}
	if rec, ok := state.InstanceStatuses.Get(s, k); ok && rec.Err == nil {
		st = rec.Value
	}
	if _, _, drained := s.Drained(k); drained {
		st.Drain = true
	}
	lease, ok := state.Leases.Get(s, k.Node)
	return st, !ok || lease.Err != nil || lease.Value.Lost
}

func instances() collection {
	return &table[catalog.InstanceKey, catalog.Instance]{
		name: client.KindInstance, res: acl.Instance, segments: []string{"namespace", "service", "node", "id"}, table: state.Instances,
		key: func(parts []string) (catalog.InstanceKey, error) {
			if err := want(parts, 4); err != nil {
				return catalog.InstanceKey{}, err
			}
			n, err := catalog.ParseName(parts[0] + "/" + parts[1])
			return catalog.InstanceKey{Service: n, Node: parts[2], ID: parts[3]}, err
		},
		keyOf: func(i catalog.Instance) (catalog.InstanceKey, error) { return i.Key(), nil },
		ref: func(k catalog.InstanceKey) client.Ref {
			return client.Ref{Kind: client.KindInstance, Parts: []string{k.Service.Namespace, k.Service.Name, k.Node, k.ID}}
		},
		show: func(k catalog.InstanceKey) string { return k.Service.Short() + "/" + k.Node + "/" + k.ID },
		scope: func(k catalog.InstanceKey) acl.Request {
			return acl.Request{Namespace: k.Service.Namespace, Name: k.Service.Name}
		},
		status: func(s *state.Snapshot, k catalog.InstanceKey) any {
			st, stale := instanceState(s, k)
			return client.InstanceStatus{InstanceStatus: st, Stale: stale}
		},
		touched:  touchedInstances,
		readOnly: "agents register them from services.d",
	}
}

func intentionsOf(trustDomain string) collection {
	key := func(i intentions.Intention) (intentions.Key, error) {
		k, err := i.Key()
		return k.In(trustDomain), err
	}
	return &table[intentions.Key, intentions.Intention]{
		name: client.KindIntention, res: acl.Intention, segments: []string{"namespace", "destination", "source_namespace", "source"}, table: state.Intentions,
		key: func(parts []string) (intentions.Key, error) {
			if len(parts) != 5 {
				if err := want(parts, 4); err != nil {
					return intentions.Key{}, err
				}
				parts = append(parts[:4:4], "")
			}
			k := intentions.Key{DestinationNamespace: parts[0], Destination: parts[1], SourceNamespace: parts[2], Source: parts[3], SourceTrustDomain: parts[4]}
			_, err := intentions.ParseKey(k.SourceString(), k.DestinationString())
			return k.In(trustDomain), err
		},
		keyOf: key,
		ref:   client.IntentionRef,
		show:  intentions.Key.String,
		scope: scopeOfIntention,
		before: func(tx *state.Tx, _ acl.Identity, k intentions.Key, i intentions.Intention) ([]string, error) {
			if err := exists(tx, "destination", k.DestinationNamespace); err != nil {
				return nil, err
			}
			if k.SourceTrustDomain == "" {
				if err := exists(tx, "source", k.SourceNamespace); err != nil {
					return nil, err
				}
			}
			return intentionWarnings(tx.Snapshot(), k, i)
		},
	}
}

// intentionWarnings finds what an intention can't do to the service as it is.
func intentionWarnings(s *state.Snapshot, k intentions.Key, i intentions.Intention) ([]string, error) {
	var warnings []string
	if k.SourceTrustDomain == "" {
		warnings = unregistered(warnings, s, "source", catalog.Name{Namespace: k.SourceNamespace, Name: k.Source})
	}
	dst := catalog.Name{Namespace: k.DestinationNamespace, Name: k.Destination}
	warnings = unregistered(warnings, s, "destination", dst)
	if rec, ok := state.Services.Get(s, dst); ok && rec.Err == nil {
		more, err := portWarnings(rec.Value, i)
		if err != nil {
			return nil, err
		}
		warnings = append(warnings, more...)
	}
	if i.Expires != nil && i.Expires.Before(time.Now()) {
		warnings = append(warnings, "the intention has expired already: it decides nothing")
	}
	return warnings, nil
}

func unregistered(warnings []string, s *state.Snapshot, side string, n catalog.Name) []string {
	if n.Name == "*" {
		return warnings
	}
	if _, ok := state.Services.Get(s, n); ok {
		return warnings
	}
	return append(warnings, fmt.Sprintf("%s %s is not registered yet%s", side, n.Short(), didYouMean(s, n)))
}

// portWarnings compares an intention with the ports of its destination. Rules
// on a port that is declared tcp are an error: nobody could have meant them.
func portWarnings(service catalog.Service, i intentions.Intention) ([]string, error) {
	var warnings []string
	for _, name := range i.Ports {
		if _, ok := service.Port(name); !ok {
			warnings = append(warnings, fmt.Sprintf("service %s has no port %q; it has %s", service.Ref().Short(), name, portNames(service)))
		}
	}
	if len(i.Rules) == 0 {
		return warnings, nil
	}
	for _, p := range service.WithDefaults().Ports {
		switch covered := len(i.Ports) == 0 || slices.Contains(i.Ports, p.Name); {
		case !covered || carriesRequests(p.Protocol):
		case p.Protocol == catalog.ProtocolTCP:
			return nil, invalid("intention", &catalog.FieldError{
				Field:   "rules",
				Problem: fmt.Sprintf("port %s of %s is declared tcp: HTTP rules can't be checked there; use an action, or name the HTTP ports in ports", p.Name, service.Ref().Short()),
			})
		}
	}
	return warnings, nil
}

// carriesRequests reports whether proxies see requests on a port of the protocol,
// rather than connections. On one without a declaration they see those of HTTP,
// which they know by their bytes.
func carriesRequests(p catalog.Protocol) bool { return p != catalog.ProtocolTCP }

// sourceID returns the identity of a local service, or the SPIFFE ID that source
// spells out.
func sourceID(trustDomain, source string) (spiffe.ID, error) {
	if id, err := spiffe.Parse(source); err == nil {
		return id, nil
	}
	n, err := catalog.ParseName(source)
	if err != nil {
		return spiffe.ID{}, fmt.Errorf("%w; write \"service\", \"ns/service\" or a SPIFFE ID", err)
	}
	return spiffe.Service(trustDomain, n.Namespace, n.Name), nil
}
