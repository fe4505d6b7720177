package dataplane

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// Reason says why a connection was refused or cut. The texts are label values of mesh_connections_refused_total and
// mesh_connections_cut_total, so an existing one never changes its meaning.
type Reason string

// The reasons.
const (
	ReasonDenied           Reason = "denied"              // an intention denies, or none allows
	ReasonPolicyChanged    Reason = "policy-changed"      // it was allowed, and the plan in force now denies it
	ReasonRemoved          Reason = "removed"             // the plan has no such instance or listener any more
	ReasonUnknownName      Reason = "unknown-name"        // the server name picks no local instance
	ReasonProtocol         Reason = "protocol-mismatch"   // both proxies do not agree on what the port speaks
	ReasonOverload         Reason = "overload"            // a limit is reached
	ReasonDraining         Reason = "draining"            // the process is about to exit
	ReasonIdle             Reason = "idle"                // no byte for too long
	ReasonExpired          Reason = "certificate-expired" // a certificate of the connection ran out
	ReasonUntrusted        Reason = "untrusted"           // the peer's roots were removed from the bundle
	ReasonNoInstance       Reason = "no-healthy-instance" // nothing to connect to
	ReasonConnect          Reason = "connect-failed"      // every instance that was tried refused or was silent
	ReasonHandshakeTimeout Reason = "timeout"             // the handshake took too long
	ReasonPlaintext        Reason = "plaintext"           // the first bytes were no TLS
	ReasonNoCertificate    Reason = "no-certificate"      // the peer presented none, or one without a usable identity
	ReasonNoLeaf           Reason = "no-leaf"             // the proxy has no valid certificate for its own side
	ReasonClosed           Reason = "closed"              // the peer went away in the handshake
	ReasonPeerRefused      Reason = "refused-by-peer"     // the peer did not accept our certificate
	ReasonLost             Reason = "lost"                // the peer acknowledges nothing any more: its host or the way there is gone
	ReasonNotHTTP          Reason = "not-http"            // an intention with HTTP rules decides, and the bytes are not HTTP: denied
	ReasonReset            Reason = "reset"               // in the access log: one side broke off a session
	ReasonOther            Reason = "other"
)

// errUnknownName is what the mesh listener answers a server name with that picks no instance.
var errUnknownName = errors.New("no instance on this host has this server name")

// handshakeReason sorts the error of a handshake.
func handshakeReason(err error) Reason {
	var record tls.RecordHeaderError
	var network net.Error
	switch {
	case errors.Is(err, errUnknownName):
		return ReasonUnknownName
	case errors.As(err, &record):
		return ReasonPlaintext
	case errors.Is(err, ca.ErrNoLeaf):
		return ReasonNoLeaf
	case errors.Is(err, ca.ErrUnknownTrustDomain), errors.Is(err, ca.ErrUntrusted), errors.Is(err, ca.ErrUsage),
		errors.Is(err, ca.ErrPeerChain), errors.Is(err, ca.ErrUnexpectedPeer):
		return ReasonUntrusted
	case errors.Is(err, ca.ErrExpired), errors.Is(err, ca.ErrNotYetValid):
		return ReasonExpired
	case errors.Is(err, ca.ErrNoCertificate), errors.Is(err, spiffe.ErrCertificate):
		return ReasonNoCertificate
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &network) && network.Timeout():
		return ReasonHandshakeTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return ReasonClosed
	default:
		return untypedReason(err)
	}
}

// untypedReason sorts the errors for which crypto/tls exports nothing to compare with. If a text changes, a counter's label
// becomes "other"; the handshake fails all the same.
func untypedReason(err error) Reason {
	var alert tls.AlertError
	switch text := err.Error(); {
	case errors.As(err, &alert):
		return ReasonPeerRefused
	case text == "tls: client didn't provide a certificate":
		return ReasonNoCertificate
	case strings.HasPrefix(text, "tls: client requested unsupported application protocols"):
		return ReasonProtocol
	default:
		return ReasonOther
	}
}
