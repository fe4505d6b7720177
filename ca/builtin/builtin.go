// Package builtin is the Authority that needs nothing outside of meshd: a root and an intermediate of its own, whose private
// keys the servers keep in their replicated store, wrapped under the cluster key. Certificates are made by smallstep's
// softcas and x509util; every template is written here, from the authenticated identity alone.
//
// The intermediate signs the leaves and is replaced each year by Renew; the root signs intermediates only and lives ten years.
package builtin

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"go.step.sm/crypto/x509util"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// Lifetimes of the CA certificates; those of leaves are in package ca. They are Consul's too.
const (
	RootTTL         = 10 * 365 * 24 * time.Hour
	IntermediateTTL = 365 * 24 * time.Hour
)

// stateVersion is what this version writes. It reads no newer one.
const stateVersion = 1

// ErrState is wrapped by every error about a stored CA that can't be used.
var ErrState = errors.New("stored CA not usable")

// State is the whole CA as the servers store it, in JSON. The private keys in it are wrapped under the cluster key, which is
// never stored beside it. Change it only through Create and Renew.
type State struct {
	Version      int    `json:"version"`
	TrustDomain  string `json:"trust_domain"`
	Root         Issuer `json:"root"`
	Intermediate Issuer `json:"intermediate"`
}

// Issuer is one CA certificate and its key.
type Issuer struct {
	Certificate []byte `json:"certificate"` // DER
	WrappedKey  []byte `json:"wrapped_key"` // PKCS #8, through ca.ClusterKey.Wrap
}

// Create makes a new CA for a trust domain: a root and an intermediate, valid from ca.Backdate before now.
func Create(key ca.ClusterKey, trustDomain string, now time.Time) (State, error) {
	if _, err := spiffe.ParseTrustDomain(trustDomain); err != nil {
		return State{}, fmt.Errorf("create a CA: %w", err)
	}
	root, rootKey, err := createIssuer(trustDomain, now, nil)
	if err != nil {
		return State{}, err
	}
	state := State{Version: stateVersion, TrustDomain: trustDomain}
	if state.Root, err = seal(key, trustDomain, roleRoot, root, rootKey); err != nil {
		return State{}, err
	}
	return withIntermediate(state, key, root, rootKey, now)
}

// Renew returns state with a new intermediate under the same root, and true, if less than half of the present one's life is
// left at now; otherwise state as it is, and false. The leaves of the old intermediate stay valid. Whoever leads the servers
// calls it now and then, stores the new state with a compare-and-set, and opens it.
func Renew(state State, key ca.ClusterKey, now time.Time) (State, bool, error) {
	root, rootKey, err := unseal(state, key, roleRoot)
	if err != nil {
		return State{}, false, err
	}
	present, _, err := unseal(state, key, roleIntermediate)
	if err != nil {
		return State{}, false, err
	}
	if present.NotAfter.Sub(now) >= present.NotAfter.Sub(present.NotBefore)/2 {
		return state, false, nil
	}
	renewed, err := withIntermediate(state, key, root, rootKey, now)
	if err != nil {
		return State{}, false, err
	}
	return renewed, true, nil
}

func withIntermediate(state State, key ca.ClusterKey, root *x509.Certificate, rootKey *ecdsa.PrivateKey, now time.Time) (State, error) {
	cert, signer, err := createIssuer(state.TrustDomain, now, &apiv1.CreateCertificateAuthorityResponse{Certificate: root, Signer: rootKey})
	if err != nil {
		return State{}, err
	}
	state.Intermediate, err = seal(key, state.TrustDomain, roleIntermediate, cert, signer)
	return state, err
}

// createIssuer makes a root if parent is nil, else an intermediate that parent signs.
func createIssuer(trustDomain string, now time.Time, parent *apiv1.CreateCertificateAuthorityResponse) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		// A CA's own name is its trust domain (SPIFFE X509-SVID, section 4.1). It is not in the subject, whose parts are at
		// most 64 characters long. The number keeps the subjects of successive CAs apart, so that chains are found at once.
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore:             now.Add(-ca.Backdate),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	request := &apiv1.CreateCertificateAuthorityRequest{Template: template, Parent: parent}
	if parent == nil {
		template.Subject = pkix.Name{Organization: []string{"meshd"}, CommonName: fmt.Sprintf("meshd root CA %08x", shortNumber(serial))}
		template.NotAfter = now.Add(RootTTL)
		request.Type, request.Lifetime = apiv1.RootCA, RootTTL
		// No path length: a cross-signed successor will stand between this root and an intermediate.
	} else {
		template.Subject = pkix.Name{Organization: []string{"meshd"}, CommonName: fmt.Sprintf("meshd intermediate CA %08x", shortNumber(serial))}
		template.NotAfter = earlier(now.Add(IntermediateTTL), parent.Certificate.NotAfter)
		template.MaxPathLenZero = true
		// Our own verifier picks the roots by trust domain and needs no constraint. Other programs that are given the bundle
		// (Envoy, a library that only checks the chain) are stopped by it from taking an identity of another trust domain.
		// It stands in the intermediate, whose key is in daily use; some verifiers ignore constraints in a root.
		template.PermittedURIDomains = []string{trustDomain}
		template.PermittedDNSDomainsCritical = true // of the whole extension, despite its name
		request.Type, request.Lifetime = apiv1.IntermediateCA, IntermediateTTL
		if !template.NotAfter.After(now) {
			return nil, nil, fmt.Errorf("%w: the root of %s ended at %s", ca.ErrIssuer, trustDomain, parent.Certificate.NotAfter)
		}
	}
	cas, err := softcas.New(context.Background(), apiv1.Options{IsCreator: true})
	if err != nil {
		return nil, nil, fmt.Errorf("create a CA for %s: %w", trustDomain, err)
	}
	made, err := cas.CreateCertificateAuthority(request)
	if err != nil {
		return nil, nil, fmt.Errorf("create a CA for %s: %w", trustDomain, err)
	}
	key, ok := made.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("create a CA for %s: the new key is a %T, want ECDSA", trustDomain, made.PrivateKey)
	}
	return made.Certificate, key, nil
}

// Config sets the lifetimes that a request without one gets. The zero Config takes the defaults of package ca.
type Config struct {
	LeafTTL time.Duration // of services and servers: ca.MinTTL to ca.MaxTTL
	NodeTTL time.Duration // of nodes: ca.MinTTL to ca.MaxTTL
}

// Validate checks the bounds; zero values are fine.
func (c Config) Validate() error {
	for _, ttl := range []struct {
		name  string
		value time.Duration
	}{{"leaf_ttl", c.LeafTTL}, {"node_ttl", c.NodeTTL}} {
		if ttl.value != 0 && (ttl.value < ca.MinTTL || ttl.value > ca.MaxTTL) {
			return fmt.Errorf("%s is %s, want %s to %s", ttl.name, ttl.value, ca.MinTTL, ca.MaxTTL)
		}
	}
	return nil
}

func (c Config) ttl(kind spiffe.Kind) time.Duration {
	chosen, fallback := c.LeafTTL, ca.DefaultTTL
	if kind == spiffe.KindNode {
		chosen, fallback = c.NodeTTL, ca.NodeTTL
	}
	if chosen != 0 {
		return chosen
	}
	return fallback
}

// Authority signs with the intermediate of one State. It implements ca.Authority and is immutable: after a Renew, open the new
// state.
type Authority struct {
	config       Config
	trustDomain  string
	root         *x509.Certificate
	intermediate *x509.Certificate
	bundle       ca.Bundle
	cas          *softcas.SoftCAS
}

var _ ca.Authority = (*Authority)(nil)

// Open unwraps the signing key and checks that the parts of state belong together. Errors wrap ErrState.
func Open(state State, key ca.ClusterKey, config Config) (*Authority, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	root, err := parseIssuer(state, roleRoot)
	if err != nil {
		return nil, err
	}
	intermediate, signer, err := unseal(state, key, roleIntermediate)
	if err != nil {
		return nil, err
	}
	if err := intermediate.CheckSignatureFrom(root); err != nil {
		return nil, fmt.Errorf("%w: the intermediate of %s is not signed by its root: %w", ErrState, state.TrustDomain, err)
	}
	bundle, err := ca.NewBundle(state.TrustDomain, root)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	cas, err := softcas.New(context.Background(), apiv1.Options{CertificateChain: []*x509.Certificate{intermediate}, Signer: signer})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	return &Authority{
		config: config, trustDomain: state.TrustDomain, root: root, intermediate: intermediate, bundle: bundle, cas: cas,
	}, nil
}

// Roots returns the root. It does not block.
func (a *Authority) Roots(context.Context) (ca.Bundle, error) { return a.bundle, nil }

// Expires returns when the root and the intermediate end, for status and metrics.
func (a *Authority) Expires() (root, intermediate time.Time) {
	return a.root.NotAfter, a.intermediate.NotAfter
}

// Sign implements ca.Authority. It takes one signature's time, some 50 µs, and does not block.
func (a *Authority) Sign(ctx context.Context, req ca.SignRequest) (ca.Chain, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("sign a leaf for %s: %w", req.ID, err)
	}
	if err := req.Validate(a.trustDomain); err != nil {
		return nil, err
	}
	now := time.Now()
	end := earlier(a.root.NotAfter, a.intermediate.NotAfter)
	if !now.Before(end) || now.Before(a.intermediate.NotBefore) {
		return nil, fmt.Errorf("%w: the intermediate of %s is valid from %s to %s, now is %s", ca.ErrIssuer, a.trustDomain,
			a.intermediate.NotBefore.Format(time.RFC3339), end.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = a.config.ttl(req.ID.Kind)
	}
	template, err := leafTemplate(req, now, earlier(now.Add(ttl), end))
	if err != nil {
		return nil, err
	}
	made, err := a.cas.CreateCertificate(&apiv1.CreateCertificateRequest{Template: template, Lifetime: ttl, Backdate: ca.Backdate})
	if err != nil {
		return nil, fmt.Errorf("sign a leaf for %s: %w", req.ID, err)
	}
	return append(ca.Chain{made.Certificate}, made.CertificateChain...), nil
}

// leafTemplate is all that a leaf contains. The subject is empty, which makes its subject alternative name critical (RFC 5280,
// section 4.2.1.6).
func leafTemplate(req ca.SignRequest, now, notAfter time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	subjectKeyID, err := x509util.GenerateSubjectKeyID(req.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ca.ErrRequest, err)
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		SubjectKeyId:          subjectKeyID,
		PublicKey:             req.PublicKey,
		URIs:                  []*url.URL{req.ID.URL()},
		DNSNames:              req.DNSNames,
		IPAddresses:           req.IPs,
		NotBefore:             now.Add(-ca.Backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, // and IsCA false: "this signs nothing" is said, not left out
	}, nil
}

// newSerial returns 128 random bits, never zero: twice what the CA/Browser Forum asks for, so that servers need not agree on a
// counter (RFC 5280, section 4.1.2.2, allows 20 octets).
func newSerial() (*big.Int, error) {
	for range 8 {
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
		if err != nil {
			return nil, fmt.Errorf("make a serial number: %w", err)
		}
		if serial.Sign() > 0 {
			return serial, nil
		}
	}
	return nil, errors.New("make a serial number: the random source returns zeros")
}

// shortNumber returns the upper 32 of a serial's 128 bits.
func shortNumber(serial *big.Int) uint64 { return new(big.Int).Rsh(serial, 96).Uint64() }

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// role says which of a State's two issuers is meant.
type role string

const (
	roleRoot         role = "root"
	roleIntermediate role = "intermediate"
)

func (r role) of(state State) Issuer {
	if r == roleRoot {
		return state.Root
	}
	return state.Intermediate
}

// purpose names a wrapped key, so that one can't be put in the place of another.
func (r role) purpose(trustDomain string) string { return "CA " + string(r) + " key of " + trustDomain }

func seal(key ca.ClusterKey, trustDomain string, r role, cert *x509.Certificate, private *ecdsa.PrivateKey) (Issuer, error) {
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return Issuer{}, fmt.Errorf("encode the %s: %w", r.purpose(trustDomain), err)
	}
	wrapped, err := key.Wrap(r.purpose(trustDomain), ca.NewSecret(der))
	if err != nil {
		return Issuer{}, err
	}
	return Issuer{Certificate: cert.Raw, WrappedKey: wrapped}, nil
}

func unseal(state State, key ca.ClusterKey, r role) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	cert, err := parseIssuer(state, r)
	if err != nil {
		return nil, nil, err
	}
	der, err := key.Unwrap(r.purpose(state.TrustDomain), r.of(state).WrappedKey)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der.Reveal())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrState, r.purpose(state.TrustDomain), err)
	}
	private, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !private.PublicKey.Equal(cert.PublicKey) {
		return nil, nil, fmt.Errorf("%w: the %s belongs to another certificate", ErrState, r.purpose(state.TrustDomain))
	}
	return cert, private, nil
}

// parseIssuer reads a certificate of state, without its key.
func parseIssuer(state State, r role) (*x509.Certificate, error) {
	if state.Version < 1 || state.Version > stateVersion {
		return nil, fmt.Errorf("%w: it has version %d, this meshd knows 1 to %d", ErrState, state.Version, stateVersion)
	}
	cert, err := x509.ParseCertificate(r.of(state).Certificate)
	if err != nil {
		return nil, fmt.Errorf("%w: %s certificate of %s: %w", ErrState, r, state.TrustDomain, err)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA || len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://"+state.TrustDomain {
		return nil, fmt.Errorf("%w: the %s certificate is not that of a CA for %s", ErrState, r, state.TrustDomain)
	}
	return cert, nil
}
