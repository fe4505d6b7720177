package ca

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// What two servers speak with each other, chosen by ALPN: Raft's own messages, or gRPC.
const (
	ALPNRaft = "mesh-raft"
	ALPNPeer = "mesh-peer"
)

// Lifetimes of admission certificates. A server renews its own after half of AdmissionTTL, and it is valid from
// AdmissionBackdate before it was made: servers whose clocks differ by up to twelve hours still admit each other. A wrong clock
// must not split a cluster, and the dates guard nothing that the cluster key does not open anyway.
const (
	AdmissionTTL      = 24 * time.Hour
	AdmissionBackdate = 12 * time.Hour
)

// admissionPurpose names the subkey of the cluster key that signs.
const admissionPurpose = "admission of servers"

// Admission lets the servers of one cluster know each other. Each derives the same small CA from the cluster key, and issues
// itself a certificate of spiffe.KindServer from it: there is nothing to ask for, and nothing to store. Whoever holds the cluster
// key is a server. Certificates of the mesh's own CA prove nothing here. It is safe for concurrent use.
type Admission struct {
	id   spiffe.ID
	key  ed25519.PrivateKey
	root *x509.Certificate
	pool *x509.CertPool

	mu   sync.Mutex
	leaf *tls.Certificate
}

// NewAdmission returns the admission of the server that is called name in a trust domain. Errors wrap ErrClusterKey, or are
// those of spiffe.ID.Valid.
func NewAdmission(key ClusterKey, trustDomain, name string) (*Admission, error) {
	a := &Admission{id: spiffe.Server(trustDomain, name), pool: x509.NewCertPool()}
	if err := a.id.Valid(); err != nil {
		return nil, fmt.Errorf("admission of %q: %w", name, err)
	}
	seed, err := key.Derive(admissionPurpose)
	if err != nil {
		return nil, err
	}
	a.key = ed25519.NewKeyFromSeed(seed.Reveal())
	// Every server makes this root anew. Nothing of it but name and key matters, and both come from the cluster key.
	root := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{Organization: []string{"meshd"}, CommonName: admissionPurpose},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore:             time.Unix(0, 0),
		NotAfter:              time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280, section 4.1.2.5: it ends with the key
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, a.key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("%w: make the CA of admission: %w", ErrClusterKey, err)
	}
	if a.root, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("%w: read the CA of admission: %w", ErrClusterKey, err)
	}
	a.pool.AddCert(a.root)
	return a, nil
}

// ID returns the identity that this server proves.
func (a *Admission) ID() spiffe.ID { return a.id }

// ServerConfig is for the listener that other servers connect to. PeerID of a finished handshake tells which server connected,
// its NegotiatedProtocol is ALPNRaft or ALPNPeer.
func (a *Admission) ServerConfig() *tls.Config {
	config := a.config(ALPNRaft, ALPNPeer)
	config.ClientAuth = tls.RequireAnyClientCert
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.certificate(time.Now()) }
	config.VerifyConnection = func(cs tls.ConnectionState) error { return a.verify(cs, "", x509.ExtKeyUsageClientAuth) }
	return config
}

// ClientConfig is for a connection to the server that is called name, "" being any server of the cluster, which is to speak
// the protocol alpn.
func (a *Admission) ClientConfig(name, alpn string) *tls.Config {
	config := a.config(alpn)
	config.InsecureSkipVerify = true // host names prove nothing in the mesh: VerifyConnection checks chain and identity
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return a.certificate(time.Now()) }
	config.VerifyConnection = func(cs tls.ConnectionState) error { return a.verify(cs, name, x509.ExtKeyUsageServerAuth) }
	return config
}

func (a *Admission) config(alpn ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, NextProtos: alpn}
}

// certificate returns the certificate to present: a new one when half of the last one's time is over, or the clock was set back.
func (a *Admission) certificate(now time.Time) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.leaf != nil && now.Before(a.leaf.Leaf.NotAfter.Add(-AdmissionTTL/2)) && now.After(a.leaf.Leaf.NotBefore.Add(AdmissionBackdate/2)) {
		return a.leaf, nil
	}
	private, err := GenerateKey()
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(2)), // 1 is the root's
		URIs:                  []*url.URL{a.id.URL()},
		NotBefore:             now.Add(-AdmissionBackdate),
		NotAfter:              now.Add(AdmissionTTL),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, private.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("issue the certificate of %s: %w", a.id, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the certificate of %s: %w", a.id, err)
	}
	a.leaf = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}
	return a.leaf, nil
}

// verify decides about a peer: a server of our trust domain, with a certificate of the admission, and the one that was meant.
// Errors wrap those of VerifyPeer.
func (a *Admission) verify(cs tls.ConnectionState, name string, usage x509.ExtKeyUsage) error {
	if len(cs.PeerCertificates) == 0 {
		return ErrNoCertificate
	}
	if cs.NegotiatedProtocol != ALPNRaft && cs.NegotiatedProtocol != ALPNPeer {
		return fmt.Errorf("%w: it speaks %q, not as a server to a server", ErrUnexpectedPeer, cs.NegotiatedProtocol)
	}
	leaf := cs.PeerCertificates[0]
	peer, err := spiffe.FromCert(leaf)
	if err != nil {
		return err //nolint:wrapcheck // says what is wrong with the peer's certificate
	}
	if peer.Kind != spiffe.KindServer || peer.TrustDomain != a.id.TrustDomain {
		return fmt.Errorf("%w: %s is no server of %s", ErrUnexpectedPeer, peer, a.id.TrustDomain)
	}
	now := time.Now()
	if err := checkTimes(leaf, peer, now); err != nil {
		return err
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || !slices.Contains(leaf.ExtKeyUsage, usage) {
		return fmt.Errorf("%w: %s", ErrUsage, peer)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return fmt.Errorf("%w: %s was not admitted by our cluster key; its cluster_key_file is another one: %w", ErrUntrusted, peer, err)
	}
	if name != "" && peer.Name != name {
		return fmt.Errorf("%w: %s answers where %s was expected", ErrUnexpectedPeer, peer, spiffe.Server(a.id.TrustDomain, name))
	}
	return nil
}
