// Package http1 is the HTTP/1.1 wire codec of the data path (RFC 9112): head
// parsers and writers for both directions and the body framings, nothing else.
//
// It is stricter than most servers: whatever two implementations are known to
// read differently is refused rather than interpreted (see [Error]), so that a
// request means the same to the policy that allowed it and to the application
// that receives it. Framing bytes of a peer are never passed on; heads and
// chunks are written anew.
//
// Nothing here does I/O, blocks, locks or starts a goroutine. Parsers work on
// a buffer of the caller and return slices into it; writers append to a slice
// of the caller. In steady state neither allocates.
package http1
