// Package meshpb is the wire between agents and servers (mesh.proto) and between
// servers (peer.proto): generated code, with the few constants that both ends
// must share.
package meshpb

// ServerName is the SNI by which a client of port 7400 asks for gRPC; any
// other name, or none, reaches the HTTP API. The port is shared because
// firewalls between hosts and servers are opened one port at a time, and
// split after the handshake because grpc-go has no keep-alive behind an
// http.Handler.
const ServerName = "grpc.meshd"

// MaxMessage is the largest message, in bytes, that a server sends. A Batch is
// one message, so that it can be applied at once; an agent has to raise
// gRPC's limit of 4 MiB to this (grpc.MaxCallRecvMsgSize).
const MaxMessage = 64 << 20
