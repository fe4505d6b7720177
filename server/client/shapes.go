package client

import (
	"encoding/json"
	"net/url"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
)

// A Kind names a sort of resource, in the singular, as manifests do.
type Kind string

// The kinds that the API lists. Instances are registered by agents, sets are made
// by apply; the others are written by users.
const (
	KindNamespace Kind = "namespace"
	KindNode      Kind = "node"
	KindService   Kind = "service"
	KindInstance  Kind = "instance"
	KindIntention Kind = "intention"
	KindSet       Kind = "set"
	KindPolicy    Kind = "policy"
	KindRole      Kind = "role"
)

// Kinds returns all kinds, in the order in which apply writes them: what others
// refer to comes first.
func Kinds() []Kind {
	return []Kind{KindNamespace, KindNode, KindService, KindInstance, KindIntention, KindSet, KindPolicy, KindRole}
}

// Collection is the kind's name in URLs and in short commands: its plural.
func (k Kind) Collection() string {
	if k == KindPolicy {
		return "policies"
	}
	return string(k) + "s"
}

// A Ref names one resource. Parts are, by kind:
//
//	namespace  name
//	node       name
//	service    namespace, name
//	instance   namespace, service, node, id
//	set        name
//	policy     name
//	role       name
//	intention  destination namespace, destination, source namespace, source[, source trust domain]
type Ref struct {
	Kind  Kind     `json:"kind"`
	Parts []string `json:"parts"`
}

// IntentionRef returns the Ref of an intention's key.
func IntentionRef(k intentions.Key) Ref {
	parts := []string{k.DestinationNamespace, k.Destination, k.SourceNamespace, k.Source}
	if k.SourceTrustDomain != "" {
		parts = append(parts, k.SourceTrustDomain)
	}
	return Ref{Kind: KindIntention, Parts: parts}
}

// Path returns the URL path and query of the resource.
func (r Ref) Path() string {
	p, parts, query := "/v1/"+r.Kind.Collection(), r.Parts, ""
	if r.Kind == KindIntention && len(parts) == 5 {
		query = "?trust_domain=" + url.QueryEscape(parts[4])
		parts = parts[:4]
	}
	for _, part := range parts {
		p += "/" + url.PathEscape(part)
	}
	return p + query
}

// Item is one resource as the API shows it.
type Item struct {
	Kind Kind `json:"kind"`
	// Name is for people: "api", "batch/cron", "api/vm-b/api-2", "web → api".
	Name string `json:"name"`
	Ref  Ref    `json:"ref"`
	// Revision is that of the spec's last write, for compare-and-set.
	Revision uint64 `json:"revision"`
	// Spec is what was written, byte for byte.
	Spec json.RawMessage `json:"spec"`
	// Status is what the mesh knows of it; absent for kinds without one.
	Status json.RawMessage `json:"status,omitempty"`
}

// List is a collection, or a page of it, at one position.
type List struct {
	Position catalog.Position `json:"position"`
	Items    []Item           `json:"items"`
	// Continue asks for the next page; empty: this is the last one.
	Continue string `json:"continue,omitempty"`
}

// Selection limits a list or a watch. The zero Selection is everything.
type Selection struct {
	// Namespace is that of services, instances, and the destinations of
	// intentions. Other kinds have none.
	Namespace string
	// Prefix is how the names begin: of services for instances, of destinations
	// for intentions. It says nothing of the namespace.
	Prefix string
	// Labels are "name=value", or "name" for any value; all must hold. Only nodes
	// have labels.
	Labels []string
}

// The types of an Event.
const (
	// EventReset begins the whole state: forget what you have. It is the first
	// event, and comes again when the state was restored from a snapshot, or when
	// this reader was too slow.
	EventReset = "reset"
	// EventPut is a resource as it is now.
	EventPut = "put"
	// EventDelete is a resource that is gone, or no longer selected.
	EventDelete = "delete"
	// EventPosition says that all up to Position has been sent. It follows the
	// state that a reset began, and each batch of changes.
	EventPosition = "position"
	// EventError is the end: its data is an Error.
	EventError = "error"
)

// Event is one line of a watch.
type Event struct {
	Type string
	// Position is that of EventReset and EventPosition.
	Position catalog.Position
	// Item is that of EventPut, and for EventDelete its Kind, Name and Ref.
	Item Item
}

// NodeStatus is the status of a node's Item.
type NodeStatus struct {
	catalog.NodeStatus
	// State is "connected", "stale" (out of touch), "left" (it has, or was out of
	// touch for so long that its instances were removed) or "unknown" (never seen).
	State string    `json:"state"`
	Since time.Time `json:"since,omitzero"`
	// Instances are those registered on the node.
	Instances int `json:"instances"`
	// Drain says that an operator has drained the node.
	Drain bool `json:"drain,omitempty"`
}

// ServiceStatus is the status of a service's Item.
type ServiceStatus struct {
	Instances int `json:"instances"`
	// Healthy instances are passing or warning, on a node that holds its lease.
	Healthy int `json:"healthy"`
	Stale   int `json:"stale,omitempty"`
}

// InstanceStatus is the status of an instance's Item.
type InstanceStatus struct {
	catalog.InstanceStatus
	// Stale says that the lease of the instance's node is lost.
	Stale bool `json:"stale,omitempty"`
}

// SetStatus is the status of a set's Item.
type SetStatus struct {
	Members []Ref `json:"members"`
}

// The outcomes of a write.
const (
	ChangeCreated   = "created"
	ChangeUpdated   = "updated"
	ChangeUnchanged = "unchanged"
	ChangeDeleted   = "deleted"
	ChangeDrained   = "drained"
	ChangeUndrained = "undrained"
)

// Change is what a write did to one resource.
type Change struct {
	Kind     Kind            `json:"kind"`
	Name     string          `json:"name"`
	Change   string          `json:"change"`
	Revision uint64          `json:"revision,omitempty"`
	Before   json.RawMessage `json:"before,omitempty"`
	After    json.RawMessage `json:"after,omitempty"`
}

// Result is what a write did.
type Result struct {
	Position catalog.Position `json:"position"`
	Changes  []Change         `json:"changes"`
	// Warnings are what is allowed and yet probably not meant, such as an
	// intention for a service that nobody registered.
	Warnings []string `json:"warnings,omitempty"`
	DryRun   bool     `json:"dry_run,omitempty"`
}

// ApplyRequest is a list of writes that are done all or none.
type ApplyRequest struct {
	Resources []Resource `json:"resources"`
	DryRun    bool       `json:"dry_run,omitempty"`
	// Set, unless empty, is recorded as what the resources belong to. It may have
	// any size.
	Set string `json:"set,omitempty"`
	// Prune deletes what belongs to the set and is not among Resources.
	Prune bool `json:"prune,omitempty"`
}

// HistorySelection limits a history of intentions. The zero one is everything.
type HistorySelection struct {
	// Namespace is that of the destinations.
	Namespace string
	// Source and Destination are those of an intention, spelled as in one.
	Source, Destination string
	Since               time.Time
	// Limit is how many transactions are wanted; 0: all.
	Limit int
}

// History is what became of intentions, or a page of it, the newest first.
type History struct {
	Position     catalog.Position `json:"position"`
	Transactions []Transaction    `json:"transactions"`
	// Continue asks for the next page; empty: this is the last one.
	Continue string `json:"continue,omitempty"`
}

// Transaction is what was changed in one step.
type Transaction struct {
	// Revision names it: see UndoRequest.
	Revision uint64    `json:"revision"`
	At       time.Time `json:"at"`
	// By is who did it, ByName what people call that.
	By     string `json:"by"`
	ByName string `json:"by_name,omitempty"`
	// Note says what was done, where it was no plain write: "undo 12", "set shop".
	Note    string   `json:"note,omitempty"`
	Changes []Change `json:"changes"`
}

// UndoRequest asks for what was before a transaction, as a new one.
type UndoRequest struct {
	Revision uint64 `json:"revision"`
	// Force overwrites what was changed again since.
	Force  bool `json:"force,omitempty"`
	DryRun bool `json:"dry_run,omitempty"`
}

// DrainRequest takes a node or an instance out of service.
type DrainRequest struct {
	Reason string `json:"reason,omitempty"`
}

// Resource is one spec with its kind beside it, so that its bytes can be
// stored as they came.
type Resource struct {
	Kind Kind            `json:"kind"`
	Spec json.RawMessage `json:"spec"`
}

// AccessRequest asks whether a request would pass.
type AccessRequest struct {
	// Source is "web", "ns/web" or a SPIFFE ID; Destination "api" or "ns/api".
	Source      string `json:"source"`
	Destination string `json:"destination"`
	// Port is the destination's port by name; empty means its default.
	Port string `json:"port,omitempty"`
	// Method and Path, both or neither, make it an HTTP request.
	Method  string              `json:"method,omitempty"`
	Path    string              `json:"path,omitempty"`
	Headers map[string][]string `json:"headers,omitempty"`
}

// ReasonDepends is the reason of an Access where rules decide request by
// request, and the question named none.
const ReasonDepends = "depends-on-request"

// Access is the decision of the evaluator that proxies use.
type Access struct {
	Allowed bool `json:"allowed"`
	// Reason is the decision's code; Text says it in words.
	Reason string `json:"reason"`
	Text   string `json:"text"`
	// Intention is the one that decided, if one did.
	Intention *Item `json:"intention,omitempty"`
	// Rule is the index of the rule that decided, -1 if none did.
	Rule int `json:"rule"`
}

// The marks of a Fact.
const (
	FactOK   = "ok"
	FactWarn = "warn"
	FactFail = "fail"
)

// Fact is one line of an explanation.
type Fact struct {
	Mark string `json:"mark"`
	Text string `json:"text"`
}

// Explanation says what would become of a request, and why.
type Explanation struct {
	Position catalog.Position `json:"position"`
	// Verdict is "ALLOWED", "DENIED by policy", "DEPENDS on the request" or
	// "ALLOWED, but it cannot be served now". Of an id it is what became of that
	// request: "DENIED by policy", "REFUSED on the mesh port: …", "FAILED: …" or, on
	// the caller's host alone, "ANSWERED by the destination's proxy: …".
	Verdict string   `json:"verdict"`
	Access  Access   `json:"access"`
	Works   bool     `json:"works"`
	Facts   []Fact   `json:"facts"`
	Next    []string `json:"next,omitempty"`
	// Records are those of the id that was asked about, the newest first: of both
	// sides, if both know of it.
	Records []flow.Record `json:"records,omitempty"`
}

// JoinTokenRequest asks for a one-time token that admits one node.
type JoinTokenRequest struct {
	Node     string   `json:"node"`
	Services []string `json:"services,omitempty"`
	// TTL is 10 minutes when zero.
	TTL catalog.Duration `json:"ttl,omitzero"`
	// Replace admits a rebuilt host under a name that is in use.
	Replace bool `json:"replace,omitempty"`
}

// JoinToken is the answer: the token is shown this once.
type JoinToken struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	// Warnings tell what the token will not do.
	Warnings []string `json:"warnings,omitempty"`
}

// Rollout says how far the proxies that a change concerns have come.
type Rollout struct {
	Position catalog.Position `json:"position"`
	Services []RolloutService `json:"services"`
	// Done says that every concerned proxy has applied the position.
	Done bool `json:"done"`
	// Closed is how many connections the concerned proxies have closed because
	// of denies since they started.
	Closed uint64 `json:"closed"`
	// Refused are the proxies that would not take the plan, with their reasons.
	Refused []string `json:"refused,omitempty"`
	// Unasked are the servers that could not be asked although agents are connected
	// to them: what their proxies run is not known.
	Unasked []string `json:"unasked,omitempty"`
}

// RolloutService is one side of a Rollout.
type RolloutService struct {
	Service string `json:"service"`
	Applied int    `json:"applied"`
	Total   int    `json:"total"`
}

// Status describes the server that answered, and what it serves.
type Status struct {
	Server       string           `json:"server"`
	Version      string           `json:"version"`
	TrustDomain  string           `json:"trust_domain"`
	FeatureLevel int              `json:"feature_level"`
	Position     catalog.Position `json:"position"`
	Started      time.Time        `json:"started"`
	Nodes        int              `json:"nodes"`
	Connected    int              `json:"connected"`
	Proxies      []ProxyStatus    `json:"proxies"`
	// Held are the nodes that fell silent together with more than half of all: none
	// of them is declared out of touch until they are back or released.
	Held []string `json:"held,omitempty"`
	// Members are the servers of the mesh, as the one that answers knows them without
	// asking.
	Members []Member `json:"members"`
}

// Released are the nodes that were held and are declared out of touch now.
type Released struct {
	Nodes []string `json:"nodes"`
}

// ProxyStatus is what one proxy last reported.
type ProxyStatus struct {
	Node  string `json:"node"`
	Proxy string `json:"proxy"`
	// Connected says that its node holds its lease; else this is what was known
	// when it was lost.
	Connected bool `json:"connected"`
	// Position is the newest input of the plan that it runs.
	Position catalog.Position `json:"position"`
	Refused  string           `json:"refused,omitempty"`
	Closed   uint64           `json:"closed"`
}
