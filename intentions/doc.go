// Package intentions decides who may call whom.
//
// An [Intention] says whether a source may reach a destination, for all of its
// traffic (an action) or request by request (ordered HTTP rules). [Compile]
// makes the intentions of one destination into a [Policy]; [Policy.Decide]
// answers one connection or request.
//
// # Which intention decides
//
// Of the intentions that cover a request's source and destination and have not
// expired, the most specific one decides alone: an exact destination before
// "ns/*" before "*", and among equals an exact source before "ns/*" before "*".
// Where two are equally specific, a deny of either wins. A less specific
// intention is never asked: what the deciding one does not allow is denied.
// Where none covers the request it is denied.
//
// "*" and "ns/*" cover the mesh's own trust domain only. A foreign source is
// always written with its trust domain: "spiffe://td/ns/x/svc/y",
// "spiffe://td/ns/x/svc/*" or "spiffe://td/*".
//
// # Rules
//
// The first rule whose every condition holds gives the answer; a request that
// matches none is denied. Conditions are read in the way that is safe for the
// rule's action, see [Rule] and [HeaderMatch].
//
// # Normalization
//
// [NormalizeTarget], [NormalizePath] and [NormalizeHost] are the only
// normalization in the mesh: what they return is what is authorized and also
// what is forwarded, so an application never sees another path than the policy
// did.
//
// The package is pure: no I/O, no clock (a [Request] carries the time), no
// goroutines, no logging.
package intentions
