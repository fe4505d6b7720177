package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	strict "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
)

// Singleton is the key of a table with one record.
type Singleton struct{}

// Cluster is what all servers of a cluster share from its first start on.
type Cluster struct {
	// TrustDomain is the cluster's for ever: every certificate names it.
	TrustDomain string `json:"trust_domain"`
	// FeatureLevel is the newest catalog.FeatureLevel that every member knows.
	FeatureLevel int       `json:"feature_level"`
	Created      time.Time `json:"created"`
}

// NodeIdentity is which host a node's name belongs to.
type NodeIdentity struct {
	// Keys are the hashes (ca.Hash) of the public keys whose certificates are
	// accepted as the node, the newest first.
	Keys []string `json:"keys"`
	// Since is when the host joined. Whatever was signed for the node well after it
	// was asked for by this host, even if Keys does not know of it because the
	// state was restored.
	Since time.Time `json:"since"`
}

// The tables. What users declare and agents register is stored as it was
// written; the rest is the servers' own.
var (
	// Namespaces, by name.
	Namespaces = &Table[string, catalog.Namespace]{
		kind: "namespace", index: 0, encode: encodeName, decode: decodeName, read: lenient[string, catalog.Namespace],
	}
	// Nodes holds what each node is permitted, by name.
	Nodes = &Table[string, catalog.Node]{
		kind: "node", index: 1, encode: encodeName, decode: decodeName, read: lenient[string, catalog.Node],
	}
	// Services, by namespace and name.
	Services = &Table[catalog.Name, catalog.Service]{
		kind: "service", index: 2, encode: encodeService, decode: decodeService, read: lenient[catalog.Name, catalog.Service],
	}
	// Instances, by service, node and ID. See also Snapshot.InstancesOf and
	// InstancesOn.
	Instances = &Table[catalog.InstanceKey, catalog.Instance]{
		kind: "instance", index: 3, encode: encodeInstance, decode: decodeInstance, read: lenient[catalog.InstanceKey, catalog.Instance],
		also: func(k catalog.InstanceKey, _ catalog.Instance) []string {
			return []string{joinPath(indexNode, k.Node, k.Service.Namespace, k.Service.Name, k.ID)}
		},
	}
	// Intentions, by destination and source. See also Snapshot.IntentionsFor
	// and Policy.
	Intentions = &Table[intentions.Key, intentions.Intention]{
		kind: "intention", index: 4, encode: encodeIntention, decode: decodeIntention, read: readIntention,
	}
	// InstanceStatuses holds the health of instances, under the instances' keys.
	InstanceStatuses = &Table[catalog.InstanceKey, catalog.InstanceStatus]{
		kind: "instance-status", index: 5, encode: encodeInstance, decode: decodeInstance, read: lenient[catalog.InstanceKey, catalog.InstanceStatus],
	}
	// NodeStatuses holds what the agents say of themselves, by node.
	NodeStatuses = &Table[string, catalog.NodeStatus]{
		kind: "node-status", index: 6, encode: encodeName, decode: decodeName, read: lenient[string, catalog.NodeStatus],
	}
	// Leases, by node.
	Leases = &Table[string, catalog.Lease]{
		kind: "lease", index: 7, encode: encodeName, decode: decodeName, read: lenient[string, catalog.Lease],
	}
	// Tokens, by acl.Hash of their secret.
	Tokens = &Table[string, acl.Token]{
		kind: "token", index: 8, encode: encodeName, decode: decodeName, read: lenient[string, acl.Token],
	}
	// JoinTokens, by acl.Hash of their secret.
	JoinTokens = &Table[string, acl.JoinToken]{
		kind: "join-token", index: 9, encode: encodeName, decode: decodeName, read: lenient[string, acl.JoinToken],
	}
	// Authorities holds the state of the certificate authority, by the name of
	// its provider. What is secret in it is wrapped under the cluster key.
	Authorities = &Table[string, json.RawMessage]{
		kind: "authority", index: 10, encode: encodeName, decode: decodeName, read: lenient[string, json.RawMessage],
	}
	// Clusters has one record.
	Clusters = &Table[Singleton, Cluster]{
		kind: "cluster", index: 11,
		encode: func(Singleton) []string { return []string{"this"} },
		decode: func(s []string) (Singleton, error) { return Singleton{}, want(s, 1) },
		read:   lenient[Singleton, Cluster],
	}
	// NodeIdentities, by node.
	NodeIdentities = &Table[string, NodeIdentity]{
		kind: "node-identity", index: 12, encode: encodeName, decode: decodeName, read: lenient[string, NodeIdentity],
	}
	// Sets, by name.
	Sets = &Table[string, Set]{
		kind: "set", index: 13, encode: encodeName, decode: decodeName, read: lenient[string, Set],
	}
	// SetMembers says of each resource which set it belongs to, if it belongs to
	// one. See also Snapshot.MembersOf.
	SetMembers = &Table[Member, Membership]{
		kind: "set-member", index: 14, encode: encodeMember, decode: decodeMember, read: lenient[Member, Membership],
		also: func(m Member, v Membership) []string {
			return []string{joinPath(indexSet, append([]string{v.Set}, encodeMember(m)...)...)}
		},
	}
	// NodeDrains holds the nodes that an operator has drained. See also
	// Snapshot.Drained.
	NodeDrains = &Table[string, Drain]{
		kind: "node-drain", index: 15, encode: encodeName, decode: decodeName, read: lenient[string, Drain],
	}
	// InstanceDrains holds the instances that an operator has drained.
	InstanceDrains = &Table[catalog.InstanceKey, Drain]{
		kind: "instance-drain", index: 16, encode: encodeInstance, decode: decodeInstance, read: lenient[catalog.InstanceKey, Drain],
	}
	// IntentionEdits is the history of intentions. Update writes it. See also
	// Snapshot.NewestEdits.
	IntentionEdits = &Table[EditsKey, Edits]{
		kind: "intention-edits", index: 17, encode: encodeEdits, decode: decodeEdits, read: lenient[EditsKey, Edits],
	}
	// Servers holds the members of the cluster, by name.
	Servers = &Table[string, Server]{
		kind: "server", index: 18, encode: encodeName, decode: decodeName, read: lenient[string, Server],
	}
	// Policies holds what tokens may do, by name; the built-in ones are not stored.
	// See also Snapshot.Access.
	Policies = &Table[string, catalog.Policy]{
		kind: "policy", index: 19, encode: encodeName, decode: decodeName,
		read: named(func(p catalog.Policy) string { return p.Name }),
	}
	// Roles holds lists of policies, by name.
	Roles = &Table[string, catalog.Role]{
		kind: "role", index: 20, encode: encodeName, decode: decodeName,
		read: named(func(r catalog.Role) string { return r.Name }),
	}
)

// rows lists the tables at their indexes.
var rows = []row{
	Namespaces, Nodes, Services, Instances, Intentions, InstanceStatuses,
	NodeStatuses, Leases, Tokens, JoinTokens, Authorities, Clusters, NodeIdentities,
	Sets, SetMembers, NodeDrains, InstanceDrains, IntentionEdits, Servers,
	Policies, Roles,
}

func rowOf(kind Kind) (row, int) {
	for i, r := range rows {
		if r.Kind() == kind {
			return r, i
		}
	}
	return nil, -1
}

// lenient reads what a newer member may have written: unknown fields pass, as
// the feature level keeps those that matter from being written too early.
func lenient[K comparable, V any](_ K, raw []byte) (V, error) {
	var v V
	if err := strict.Unmarshal(raw, &v, jsontext.AllowDuplicateNames(true)); err != nil {
		return v, fmt.Errorf("decode: %w", err)
	}
	return v, nil
}

// readIntention is strict where lenient is not: an intention of which a part is
// not understood might mean something else, so it denies. So does one that was
// stored under a key that is not its own.
func readIntention(key intentions.Key, raw []byte) (intentions.Intention, error) {
	var v intentions.Intention
	if err := strict.Unmarshal(raw, &v, strict.RejectUnknownMembers(true)); err != nil {
		return v, fmt.Errorf("decode: %w", err)
	}
	own, err := v.Key()
	if err != nil {
		return v, fmt.Errorf("decode: %w", err)
	}
	// Keys leave out the mesh's own trust domain, which a source may spell out.
	if key.SourceTrustDomain == "" {
		own.SourceTrustDomain = ""
	}
	if own != key {
		return v, fmt.Errorf("%w: it says %s and is stored as %s", errKey, own, key)
	}
	return v, nil
}

// named reads strictly what gives permissions: a part that is not understood might
// narrow it. So is one refused that was stored under another name than its own.
func named[V any](name func(V) string) func(string, []byte) (V, error) {
	return func(key string, raw []byte) (V, error) {
		var v V
		if err := strict.Unmarshal(raw, &v, strict.RejectUnknownMembers(true)); err != nil {
			return v, fmt.Errorf("decode: %w", err)
		}
		if name(v) != key {
			return v, fmt.Errorf("%w: it says %s and is stored as %s", errKey, name(v), key)
		}
		return v, nil
	}
}

var errSegments = errors.New("wrong number of segments")

func want(segments []string, n int) error {
	if len(segments) != n {
		return fmt.Errorf("%w: %w: %d, want %d", errKey, errSegments, len(segments), n)
	}
	return nil
}

func encodeName(name string) []string { return []string{name} }

func decodeName(s []string) (string, error) {
	if err := want(s, 1); err != nil {
		return "", err
	}
	return s[0], nil
}

func encodeService(n catalog.Name) []string { return []string{n.Namespace, n.Name} }

func decodeService(s []string) (catalog.Name, error) {
	if err := want(s, 2); err != nil {
		return catalog.Name{}, err
	}
	return catalog.Name{Namespace: s[0], Name: s[1]}, nil
}

func encodeInstance(k catalog.InstanceKey) []string {
	return []string{k.Service.Namespace, k.Service.Name, k.Node, k.ID}
}

func decodeInstance(s []string) (catalog.InstanceKey, error) {
	if err := want(s, 4); err != nil {
		return catalog.InstanceKey{}, err
	}
	return catalog.InstanceKey{Service: catalog.Name{Namespace: s[0], Name: s[1]}, Node: s[2], ID: s[3]}, nil
}

func encodeIntention(k intentions.Key) []string {
	return []string{k.DestinationNamespace, k.Destination, k.SourceTrustDomain, k.SourceNamespace, k.Source}
}

func decodeIntention(s []string) (intentions.Key, error) {
	if err := want(s, 5); err != nil {
		return intentions.Key{}, err
	}
	return intentions.Key{
		DestinationNamespace: s[0], Destination: s[1], SourceTrustDomain: s[2], SourceNamespace: s[3], Source: s[4],
	}, nil
}
