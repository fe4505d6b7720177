// Package catalog holds the nouns of the mesh: namespaces, nodes, services,
// instances, their checks and health, and the definitions that people write
// for an agent.
//
// There is one struct per noun. The JSON of a spec (what a user or an agent
// declares) is at once its stored form and its API form; status (what was
// observed) has structs and keys of its own. No machine rewrites a spec:
// defaults are a view, [Service.WithDefaults] and its like, that is never
// stored. Validate reports every problem of a value, each as a [*FieldError]
// that says where, what and what to do instead.
//
// The package is pure: it does no I/O, starts no goroutine and does not log.
// All values are safe for concurrent reading.
package catalog

// FeatureLevel is the level of the data model that this build understands.
//
// The rule: a release that adds a field which older members would ignore
// raises the level by one. Servers write such a field only when every server,
// and every agent and proxy that would have to enforce it, has reported a
// level that includes it (NodeStatus.FeatureLevel); until then the write is
// refused. Stored bytes are read leniently, so an older member survives a newer
// field; the level is what keeps it from ignoring one that matters.
const FeatureLevel = 1
