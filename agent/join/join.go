// Package join gets a host its first certificate.
//
// A join token names the servers, pins their roots by a hash and holds a
// secret. With it an agent that knows nobody connects, proves to itself whom it
// talks to, and trades the secret for a node certificate. The key is on disk
// before the first call, so that an answer which was lost in a crash is asked
// for again with the same key, which the servers take until the token expires.
package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

const (
	identityFile = "identity.json"
	keyFile      = "join.key"
	keyType      = "PRIVATE KEY"
	// attemptTimeout bounds one call to one server.
	attemptTimeout = 10 * time.Second
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = 15 * time.Second
	// tellSkew is from which difference on a clock is worth a word.
	tellSkew = time.Minute
	// maxToken bounds the token file.
	maxToken = 16 << 10
)

// Why a host could not join. Each error of Join wraps exactly one of these or
// comes from the context.
var (
	ErrNoToken      = errors.New("no identity and no join token")
	ErrBadToken     = errors.New("the join token can't be used")
	ErrTokenUsed    = errors.New("the join token was used already")
	ErrTokenExpired = errors.New("the join token is expired")
	ErrOtherNode    = errors.New("the join token admits another node")
	ErrNameInUse    = errors.New("the node name is in use by another machine")
	ErrClock        = errors.New("a clock is wrong")
	ErrImpostor     = errors.New("the server is not one that the join token names")
	ErrUnreachable  = errors.New("no server can be reached")
	ErrRefused      = errors.New("the server refuses to admit this host")
	ErrState        = errors.New("the identity can't be kept")
)

// Identity is what a host has once it joined. The leaf is the first one;
// renewed ones are kept elsewhere.
type Identity struct {
	TrustDomain string
	Node        string
	Servers     []string // host:port, as the servers named themselves
	Bundle      ca.Bundle
	Leaf        *ca.Leaf
}

// stored is the file form of Identity.
type stored struct {
	TrustDomain string    `json:"trust_domain"`
	Node        string    `json:"node"`
	Servers     []string  `json:"servers"`
	Bundle      ca.Bundle `json:"bundle"`
	Leaf        []byte    `json:"leaf"` // PEM, with its key
}

// Load reads the identity that Save wrote. It wraps fs.ErrNotExist if this
// host never joined, statedir.ErrCorrupt if the file is damaged.
func Load(dir statedir.Dir) (*Identity, error) {
	data, err := dir.Read(identityFile)
	if err != nil {
		return nil, fmt.Errorf("load the node's identity: %w", err)
	}
	var s stored
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("load the node's identity: %w", err)
	}
	l, err := ca.ParseLeafPEM(ca.NewSecret(s.Leaf))
	if err != nil {
		return nil, fmt.Errorf("load the node's identity: %w", err)
	}
	return &Identity{TrustDomain: s.TrustDomain, Node: s.Node, Servers: s.Servers, Bundle: s.Bundle, Leaf: l}, nil
}

// Save keeps the identity.
func (i *Identity) Save(dir statedir.Dir) error {
	leafPEM, err := i.Leaf.PEM()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	data, err := json.Marshal(stored{
		TrustDomain: i.TrustDomain, Node: i.Node, Servers: i.Servers, Bundle: i.Bundle, Leaf: leafPEM.Reveal(),
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if err := dir.Write(identityFile, data); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// Config is what joining needs.
type Config struct {
	Log *slog.Logger
	// Dir is where the key and the identity are kept.
	Dir statedir.Dir
	// TokenFile holds the join token. It is deleted once the host has joined.
	TokenFile string
	// Node is the name that this host wants; it must be the token's.
	Node string
	// Servers are tried before those that the token names; host:port.
	Servers      []string
	Version      string
	FeatureLevel int
}

// Join trades the token for an identity, and keeps it. While no server can be
// reached, or a server says to try later, it tries again until ctx ends: hosts
// often start before their servers. Every other failure is final, for the
// token would not become better.
func Join(ctx context.Context, cfg Config) (*Identity, error) {
	token, err := readToken(cfg.TokenFile)
	if err != nil {
		return nil, err
	}
	key, err := loadOrMakeKey(cfg.Dir)
	if err != nil {
		return nil, err
	}
	backoff, last := minBackoff, ""
	for {
		identity, err := attempt(ctx, cfg, token, key)
		if err == nil {
			return identity, finish(cfg, identity)
		}
		if ctx.Err() != nil || !errors.Is(err, ErrUnreachable) {
			return nil, fmt.Errorf("join as node %s: %w", cfg.Node, err)
		}
		if err.Error() != last {
			last = err.Error()
			cfg.Log.WarnContext(ctx, "not joined yet; trying again", slog.Any("error", err))
		}
		timer := time.NewTimer(backoff/2 + rand.N(backoff)) //nolint:gosec // spreads load, guards nothing
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		backoff = min(2*backoff, maxBackoff)
	}
}

func readToken(file string) (ca.JoinToken, error) {
	info, err := os.Stat(file)
	if file == "" || errors.Is(err, fs.ErrNotExist) {
		return ca.JoinToken{}, fmt.Errorf("%w: run `meshctl token join --node NAME --services LIST` where you are logged in, and put its output into %q",
			ErrNoToken, file)
	}
	if err == nil && info.Size() > maxToken {
		err = fmt.Errorf("%d bytes, at most %d are read", info.Size(), maxToken)
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(file) //nolint:gosec // the operator's own file
	}
	if err != nil {
		return ca.JoinToken{}, fmt.Errorf("%w: file %s: %w", ErrBadToken, file, err)
	}
	token, err := ca.ParseJoinToken(string(data))
	if err != nil {
		return ca.JoinToken{}, fmt.Errorf("%w: file %s: %w", ErrBadToken, file, err)
	}
	return token, nil
}

// loadOrMakeKey returns the key of an attempt before, if there was one.
func loadOrMakeKey(dir statedir.Dir) (*ecdsa.PrivateKey, error) {
	data, err := dir.Read(keyFile)
	if err == nil {
		if block, _ := pem.Decode(data); block != nil && block.Type == keyType {
			if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if key, ok := key.(*ecdsa.PrivateKey); ok {
					return key, nil
				}
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, statedir.ErrCorrupt) {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	if err := dir.Write(keyFile, pem.EncodeToMemory(&pem.Block{Type: keyType, Bytes: der})); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	return key, nil
}

// finish makes the identity durable, then drops what led to it.
func finish(cfg Config, identity *Identity) error {
	if err := identity.Save(cfg.Dir); err != nil {
		return err
	}
	if err := cfg.Dir.Remove(keyFile); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if err := os.Remove(cfg.TokenFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		cfg.Log.Warn("the used join token can't be deleted; it is worth nothing any more", slog.String("file", cfg.TokenFile), slog.Any("error", err))
	}
	cfg.Log.Info("joined", slog.String("node", identity.Node), slog.String("trust_domain", identity.TrustDomain),
		slog.Time("not_after", identity.Leaf.NotAfter()))
	return nil
}

// attempt asks every server once. A cause that another server would name too
// ends it.
func attempt(ctx context.Context, cfg Config, token ca.JoinToken, key *ecdsa.PrivateKey) (*Identity, error) {
	var servers []string
	for _, s := range slices.Concat(cfg.Servers, token.Servers) {
		if !slices.Contains(servers, s) {
			servers = append(servers, s)
		}
	}
	var first error
	for _, server := range servers {
		identity, err := ask(ctx, cfg, token, key, server)
		if err == nil {
			return identity, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		err = fmt.Errorf("server %s: %w", server, err)
		if !errors.Is(err, ErrUnreachable) && !errors.Is(err, ErrImpostor) {
			return nil, err
		}
		// An impostor is worth telling even where another is merely away.
		if first == nil || errors.Is(err, ErrImpostor) && !errors.Is(first, ErrImpostor) {
			first = err
		}
	}
	return nil, first
}

// handshake remembers why TLS failed: gRPC passes on text only.
type handshake struct {
	mu  sync.Mutex
	err error
}

func (h *handshake) config(pin ca.Hash) *tls.Config {
	config := ca.PinnedConfig(pin, meshpb.ServerName, []string{"h2"})
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		err := verify(cs)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.err = err
		return err
	}
	return config
}

func (h *handshake) why() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// ask makes one call to one server.
func ask(ctx context.Context, cfg Config, token ca.JoinToken, key *ecdsa.PrivateKey, server string) (*Identity, error) {
	csr, err := ca.NewCSR(key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	var shake handshake
	conn, err := grpc.NewClient("passthrough:///"+server, grpc.WithTransportCredentials(credentials.NewTLS(shake.config(token.Roots))))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer func() { _ = conn.Close() }()
	resp, err := meshpb.NewMeshClient(conn).Join(ctx, &meshpb.JoinRequest{
		Secret: token.Secret.Reveal(), Csr: csr, Node: cfg.Node, Version: cfg.Version, FeatureLevel: int32(cfg.FeatureLevel), //nolint:gosec // a small constant
	})
	if err != nil {
		return nil, cause(shake.why(), err)
	}
	return check(cfg, token, key, resp)
}

// cause turns a failure into one of the package's errors.
func cause(handshake, err error) error {
	switch {
	case handshake == nil:
	case errors.Is(handshake, ca.ErrNotYetValid), errors.Is(handshake, ca.ErrExpired):
		return fmt.Errorf("%w: this host's, or the server's: %w", ErrClock, handshake)
	default:
		return fmt.Errorf("%w: %w", ErrImpostor, handshake)
	}
	reason, at := meshpb.ReasonOf(err)
	message := status.Convert(err).Message() + skew(at)
	switch reason {
	case meshpb.ReasonTokenUsed:
		return fmt.Errorf("%w: %s", ErrTokenUsed, message)
	case meshpb.ReasonTokenExpired:
		return fmt.Errorf("%w: %s", ErrTokenExpired, message)
	case meshpb.ReasonTokenNode:
		return fmt.Errorf("%w: %s", ErrOtherNode, message)
	case meshpb.ReasonTokenUnknown:
		return fmt.Errorf("%w: %s", ErrBadToken, message)
	case meshpb.ReasonNameInUse:
		return fmt.Errorf("%w: %s", ErrNameInUse, message)
	case meshpb.ReasonClock:
		return fmt.Errorf("%w: %s", ErrClock, message)
	case "", meshpb.ReasonTooMany, meshpb.ReasonStore, meshpb.ReasonStopping:
		return fmt.Errorf("%w: %s: %s", ErrUnreachable, status.Code(err), message)
	default:
		return fmt.Errorf("%w: %s", ErrRefused, message)
	}
}

// skew says how far this host's clock is from a server's, where it matters.
func skew(server time.Time) string {
	off := time.Since(server).Round(time.Second)
	switch {
	case server.IsZero() || off.Abs() < tellSkew:
		return ""
	case off < 0:
		return fmt.Sprintf(" (this host's clock is %s behind the server's)", -off)
	default:
		return fmt.Sprintf(" (this host's clock is %s ahead of the server's)", off)
	}
}

// check holds the answer to what the token pins and to what was asked for.
func check(cfg Config, token ca.JoinToken, key *ecdsa.PrivateKey, resp *meshpb.JoinResponse) (*Identity, error) {
	var bundle ca.Bundle
	if err := json.Unmarshal(resp.GetBundle(), &bundle); err != nil {
		return nil, fmt.Errorf("%w: its roots: %w", ErrImpostor, err)
	}
	if got := bundle.Hash(resp.GetTrustDomain()); got != token.Roots {
		return nil, fmt.Errorf("%w: it sent roots with hash %s, the token pins %s", ErrImpostor, got, token.Roots)
	}
	id := spiffe.Node(resp.GetTrustDomain(), cfg.Node)
	chain, err := ca.ParseChain(resp.GetChain())
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate: %w", ErrRefused, err)
	}
	issued := chain[0].NotBefore.Add(ca.Backdate) // the server's clock when it signed
	_, _, err = ca.VerifyPeer(bundle, resp.GetChain(), time.Now(), x509.ExtKeyUsageClientAuth, ca.Expect(id))
	switch {
	case errors.Is(err, ca.ErrNotYetValid), errors.Is(err, ca.ErrExpired):
		return nil, fmt.Errorf("%w: the certificate that was just issued is not valid now%s; set the clock and start again, the token stays good until it expires",
			ErrClock, skew(issued))
	case err != nil:
		return nil, fmt.Errorf("%w: its certificate: %w", ErrRefused, err)
	}
	leaf, err := ca.NewLeaf(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate: %w", ErrRefused, err)
	}
	if s := skew(issued); s != "" {
		cfg.Log.Warn("clocks differ: beyond five minutes certificates are refused", slog.String("clocks", s))
	}
	servers := resp.GetServers()
	if len(servers) == 0 {
		servers = token.Servers
	}
	return &Identity{TrustDomain: resp.GetTrustDomain(), Node: cfg.Node, Servers: servers, Bundle: bundle, Leaf: leaf}, nil
}
