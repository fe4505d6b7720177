package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

var (
	// ErrTrustDomain is wrapped when the stored cluster has another trust domain
	// than the configuration.
	ErrTrustDomain = errors.New("trust domain can't be changed")
	// ErrTooOld is wrapped when the cluster uses what this program does not know.
	ErrTooOld = errors.New("this version is too old for the cluster")
)

// settlePause is how often a server that waits for the cluster's record looks
// whether it leads by now.
const settlePause = 100 * time.Millisecond

// settle returns nil once the store holds a cluster and it is ours. The server
// that leads makes one out of an empty store; the others wait for it.
func (m *member) settle(ctx context.Context) error {
	for {
		snapshot := m.state.Snapshot()
		if m.engine.Stats().Leading {
			err := bootstrap(ctx, m.config, m.state, m.authority.key, m.log)
			if !errors.Is(err, store.ErrNoLeader) && !errors.Is(err, store.ErrUnknownOutcome) {
				return err
			}
		} else if cluster, exists := state.Clusters.Get(snapshot, state.Singleton{}); exists {
			return checkCluster(m.config, cluster)
		}
		timer := time.NewTimer(settlePause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.state.Changed(snapshot):
		case <-timer.C:
		}
		timer.Stop()
	}
}

// bootstrap makes a cluster out of an empty store, or checks that the stored one is
// ours.
func bootstrap(ctx context.Context, config Config, st *state.State, key ca.ClusterKey, log *slog.Logger) error {
	now := time.Now().UTC()
	token, err := firstToken(config, st, now)
	if err != nil {
		return err
	}
	fault.Point(fault.KeyWriteBefore)
	_, err = st.Update(ctx, func(tx *state.Tx) error { //nolint:contextcheck // making a CA does no I/O
		cluster, exists := state.Clusters.Get(tx, state.Singleton{})
		if exists {
			return checkCluster(config, cluster)
		}
		fresh := state.Cluster{TrustDomain: config.TrustDomain, FeatureLevel: catalog.FeatureLevel, Created: now}
		if err := state.Clusters.Put(tx, state.Singleton{}, fresh); err != nil {
			return fmt.Errorf("create the cluster: %w", err)
		}
		if err := state.Namespaces.Put(tx, catalog.DefaultNamespace, catalog.Namespace{Name: catalog.DefaultNamespace}); err != nil {
			return fmt.Errorf("create the cluster: %w", err)
		}
		authority, err := builtin.Create(key, config.TrustDomain, now)
		if err != nil {
			return fmt.Errorf("create the cluster: %w", err)
		}
		raw, err := json.Marshal(authority)
		if err != nil {
			return fmt.Errorf("create the cluster: encode its CA: %w", err)
		}
		return state.Authorities.PutRaw(tx, ProviderBuiltin, raw)
	})
	fault.Point(fault.KeyWriteAfter)
	if err != nil || token == nil {
		return err //nolint:wrapcheck // says what was done
	}
	stored := false
	_, err = st.Update(ctx, func(tx *state.Tx) error {
		if stored = state.Tokens.Len(tx) == 0; !stored {
			return nil
		}
		return state.Tokens.Put(tx, acl.Hash([]byte(token.secret)), token.record)
	})
	if err != nil {
		return fmt.Errorf("store the first admin token: %w", err)
	}
	if !stored {
		return token.forget() // another server was first, and its token is the one that counts
	}
	log.InfoContext(ctx, "the first admin token is in a file", slog.String("path", token.path))
	return nil
}

func checkCluster(config Config, cluster state.Record[state.Cluster]) error {
	switch {
	case cluster.Err != nil:
		return fmt.Errorf("read the cluster's record: %w", cluster.Err)
	case cluster.Value.TrustDomain != config.TrustDomain:
		return fmt.Errorf("%w: %s holds the state of %q, and trust_domain is %q; set it back, or use another data_dir",
			ErrTrustDomain, config.DataDir, cluster.Value.TrustDomain, config.TrustDomain)
	case cluster.Value.FeatureLevel > catalog.FeatureLevel:
		return fmt.Errorf("%w: it is at feature level %d, this program knows %d: start a newer version",
			ErrTooOld, cluster.Value.FeatureLevel, catalog.FeatureLevel)
	default:
		return nil
	}
}

// adminToken is the first token: where its secret lies, and what is stored of it.
type adminToken struct {
	path, secret string
	record       acl.Token
	made         bool // by this start
}

// forget removes a file whose token was never stored.
func (t *adminToken) forget() error {
	if !t.made {
		return nil
	}
	if err := os.Remove(t.path); err != nil {
		return fmt.Errorf("remove an admin token that is not needed: %w", err)
	}
	return nil
}

// firstToken returns the token to store while there is none. A made one is on disk
// before it is stored, so that a crash in between loses nothing: the next start
// finds the file.
func firstToken(config Config, st *state.State, now time.Time) (*adminToken, error) {
	if state.Tokens.Len(st.Snapshot()) > 0 {
		return nil, nil //nolint:nilnil // none is needed
	}
	const description = "bootstrap"
	path := config.BootstrapTokenFile
	if path == "" {
		path = filepath.Join(config.DataDir, "admin.token")
	}
	data, err := readPrivate(path)
	switch {
	case err == nil:
		secret := strings.TrimSpace(string(data))
		record, err := acl.AdoptToken(secret, acl.PolicyAdmin, description, now)
		if err != nil {
			return nil, fmt.Errorf("read the first admin token from %s: %w", path, err)
		}
		return &adminToken{path: path, secret: secret, record: record}, nil
	case config.BootstrapTokenFile == "" && errors.Is(err, fs.ErrNotExist):
		record, secret := acl.NewToken(acl.PolicyAdmin, description, now)
		if err := writePrivate(path, []byte(secret+"\n")); err != nil {
			return nil, fmt.Errorf("keep the first admin token: %w", err)
		}
		return &adminToken{path: path, secret: secret, record: record, made: true}, nil
	default:
		return nil, fmt.Errorf("read the first admin token: %w", err)
	}
}
