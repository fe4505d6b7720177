// Package record protects the bytes of a connection between proxies: the record
// layer of TLS 1.3 (RFC 8446 section 5), under keys that crypto/tls agreed on.
//
// The handshake, with all that it verifies, is that of crypto/tls. What comes
// after it is done here, because crypto/tls allocates per record and keeps
// buffers and the whole handshake for as long as a connection lives. A [Conn]
// allocates nothing for what it carries, and one on which nothing is under way
// holds no buffer. proxy/DESIGN.md has the figures, docs/adr/0005 the reasons.
package record
