// Package l7 gives HTTP one shape, the [Exchange]: a request head, a body
// pulled with credit, a response, an abort with a reason, an identity and a
// deadline. Serving ends make exchanges out of connections, forwarding ends
// carry them to upstreams, and everything between (policy, routing, retry,
// mirror, filters) is written once, for every version of HTTP.
//
// Everything is pulled. A [Handler] answers at once with a [Response] that has
// not happened yet; the serving end pulls its heads and its bytes as fast as
// its client takes them, and the forwarding end pulls the request's bytes as
// fast as its upstream takes them. So back-pressure needs no code of its own,
// and nobody is ever handed bytes that he has no room for. DESIGN.md beside
// this file has the reasons, the invariants and what was refused.
package l7
