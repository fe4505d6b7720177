package ca

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// ErrNoLeaf is what a callback of ServerOptions or ClientOptions returns while there is no leaf to present.
var ErrNoLeaf = errors.New("no certificate to present")

// ClientCertificate tells whether a listener takes clients that present no certificate.
type ClientCertificate uint8

const (
	// ClientCertificateRequired refuses a client without a certificate. It is the zero value.
	ClientCertificateRequired ClientCertificate = iota
	// ClientCertificateOptional lets a client without a certificate in; one that presents a bad certificate is refused all the
	// same. It is for the server's API port, where people authenticate by token.
	ClientCertificateOptional
)

// ServerOptions are the parts of ServerConfig. Leaf and Bundle are called in every handshake, from its goroutine, so that both
// can be replaced at run time; they must not block.
type ServerOptions struct {
	// Leaf returns the certificate for the server name that the client sent, "" if it sent none.
	Leaf func(serverName string) (*tls.Certificate, error)
	// Bundle returns the roots that clients are verified against.
	Bundle func() Bundle
	// Accept has the last word on a verified client; nil refuses every certificate. See AcceptAny, Expect, ExpectKind.
	Accept func(spiffe.ID) error
	// ClientCertificate is whether a client must present one.
	ClientCertificate ClientCertificate
	// ALPN lists the application protocols in order of preference. A client that offers none of them is refused. One that
	// offers nothing at all gets "", and so, by an exception in crypto/tls, does one that offers only http/1.1 where only h2 is
	// listed: look at NegotiatedProtocol before speaking.
	ALPN []string
}

// ServerConfig returns the configuration of a listener: TLS 1.3 only, without session tickets, so that every connection is
// verified in full by the rules of VerifyPeer. PeerID tells who the client of a finished handshake is.
func ServerConfig(o ServerOptions) *tls.Config {
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             o.ALPN,
		ClientAuth:             tls.RequireAnyClientCert,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if o.Leaf == nil {
				return nil, ErrNoLeaf
			}
			return unexpired(o.Leaf(hello.ServerName))
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verifyConnection(cs, o.Bundle, x509.ExtKeyUsageClientAuth, o.Accept)
		},
	}
	if o.ClientCertificate == ClientCertificateOptional {
		config.ClientAuth = tls.RequestClientCert
		verify := config.VerifyConnection
		config.VerifyConnection = func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			return verify(cs)
		}
	}
	return config
}

// ClientOptions are the parts of ClientConfig. Leaf and Bundle are called in every handshake, from its goroutine, so that both
// can be replaced at run time; they must not block.
type ClientOptions struct {
	// Leaf returns our own certificate; nil presents none, for users who authenticate by token.
	Leaf func() (*tls.Certificate, error)
	// Bundle returns the roots that the server is verified against.
	Bundle func() Bundle
	// Accept has the last word on the verified server; nil refuses it. See Expect and ExpectKind.
	Accept func(spiffe.ID) error
	// ServerName is sent as SNI. It chooses the instance and proves nothing: the server's identity is what Accept accepts.
	ServerName string
	// ALPN lists the application protocols in order of preference.
	ALPN []string
}

// ClientConfig returns the configuration of one connection, or of many to the same server name: TLS 1.3 only, never resumed, so
// that every connection verifies the server in full by the rules of VerifyPeer.
func ClientConfig(o ClientOptions) *tls.Config {
	config := clientBase(o.ServerName, o.ALPN)
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		return verifyConnection(cs, o.Bundle, x509.ExtKeyUsageServerAuth, o.Accept)
	}
	if o.Leaf != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return unexpired(o.Leaf())
		}
	}
	return config
}

// PinnedConfig returns the configuration for a host that has no roots yet, only their hash from a join token or from
// `meshd server fingerprint`. The server must present its roots in its chain (Leaf.TLSWithRoots). They are used only if
// Bundle.Hash of them equals pin, and then the server is verified against them in full and must be of kind spiffe.KindServer.
// PeerID of the connection tells the trust domain. The zero pin refuses every server.
func PinnedConfig(pin Hash, serverName string, alpn []string) *tls.Config {
	config := clientBase(serverName, alpn)
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		bundle, err := pinnedBundle(pin, cs.PeerCertificates)
		if err != nil {
			return err
		}
		trustDomain := bundle.TrustDomains()[0]
		get := func() Bundle { return bundle }
		return verifyConnection(cs, get, x509.ExtKeyUsageServerAuth, ExpectKind(trustDomain, spiffe.KindServer))
	}
	return config
}

// pinnedBundle collects the self-issued CA certificates of a presented chain, and returns them as roots of the leaf's trust
// domain if they are what pin names.
func pinnedBundle(pin Hash, presented Chain) (Bundle, error) {
	if len(presented) == 0 {
		return Bundle{}, ErrNoCertificate
	}
	id, err := spiffe.FromCert(presented[0])
	if err != nil {
		return Bundle{}, err
	}
	var roots []*x509.Certificate
	for _, cert := range presented[1:] {
		if bytes.Equal(cert.RawSubject, cert.RawIssuer) {
			roots = append(roots, cert)
		}
	}
	if len(roots) == 0 {
		return Bundle{}, fmt.Errorf("%w: %s presented no root to compare with the pinned hash", ErrUntrusted, id)
	}
	bundle, err := NewBundle(id.TrustDomain, roots...)
	if err != nil {
		return Bundle{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	if got := bundle.Hash(id.TrustDomain); pin.IsZero() || got != pin {
		return Bundle{}, fmt.Errorf("%w: the roots of %s have hash %s, pinned is %s", ErrUntrusted, id, got, pin)
	}
	return bundle, nil
}

func clientBase(serverName string, alpn []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		ServerName:             serverName,
		NextProtos:             alpn,
		InsecureSkipVerify:     true, //nolint:gosec // host names prove nothing in the mesh: VerifyConnection checks chain and identity
	}
}

// verifyConnection runs in VerifyConnection, not in VerifyPeerCertificate, because crypto/tls skips the latter on a resumed
// connection.
func verifyConnection(cs tls.ConnectionState, bundle func() Bundle, usage x509.ExtKeyUsage, accept func(spiffe.ID) error) error {
	var roots Bundle
	if bundle != nil {
		roots = bundle()
	}
	_, _, err := verifyChain(roots, cs.PeerCertificates, time.Now(), usage, accept)
	return err
}

// unexpired passes a leaf on unless its time is over: the peer would refuse it with a less telling error.
func unexpired(cert *tls.Certificate, err error) (*tls.Certificate, error) {
	if err != nil {
		return nil, err
	}
	if cert == nil {
		return nil, ErrNoLeaf
	}
	if cert.Leaf != nil {
		if late := time.Since(cert.Leaf.NotAfter); late > 0 {
			return nil, fmt.Errorf("%w: our own ended %s ago", ErrExpired, late.Round(time.Second))
		}
	}
	return cert, nil
}

// PeerID returns who the peer of a finished handshake is, for a connection made under ServerConfig, ClientConfig or
// PinnedConfig: those have verified it. A client that presented no certificate gives ErrNoCertificate.
func PeerID(cs tls.ConnectionState) (spiffe.ID, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return spiffe.ID{}, ErrNoCertificate
	}
	return spiffe.FromCert(cs.PeerCertificates[0])
}
