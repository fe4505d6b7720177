package server

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/state"
)

// announceRetry is the pause after a failed write of this server's record.
const announceRetry = time.Second

// addresses returns where agents find servers: all that have announced
// themselves, and this one.
func (m *member) addresses(own string) []string {
	all := m.state.Snapshot().Addresses()
	if !slices.Contains(all, own) {
		all = append(all, own)
	}
	return all
}

// announce keeps this server's record in the state as it should be, until ctx
// ends: a restored snapshot, or an older process under this name, knew another.
func (m *member) announce(ctx context.Context, record state.Server) error {
	told := false
	for {
		snapshot := m.state.Snapshot()
		if have, ok := state.Servers.Get(snapshot, m.name); ok && (sameServer(have.Value, record) || slices.Contains(have.Value.Removed, m.id)) {
			told = false
			select {
			case <-ctx.Done():
				return nil
			case <-m.state.Changed(snapshot):
				continue
			}
		}
		_, err := m.state.Update(ctx, func(tx *state.Tx) error {
			have, _ := state.Servers.Get(tx, m.name)
			if slices.Contains(have.Value.Removed, m.id) {
				return nil // an operator has removed it, and it has not learnt that yet
			}
			record.Removed = have.Value.Removed
			if err := state.Servers.Put(tx, m.name, record); err != nil {
				return fmt.Errorf("announce this server: %w", err)
			}
			return nil
		})
		if err == nil {
			continue
		}
		if !told && ctx.Err() == nil {
			told = true
			m.log.WarnContext(ctx, "this server could not announce itself; trying again", slog.Any("error", err))
		}
		if !pause(ctx, announceRetry) {
			return nil
		}
	}
}

// sameServer compares what a server says of itself.
func sameServer(a, b state.Server) bool {
	return a.ID == b.ID && a.Address == b.Address && a.PeerAddress == b.PeerAddress && a.Version == b.Version &&
		a.FeatureLevel == b.FeatureLevel && a.NonVoter == b.NonVoter && a.Started.Equal(b.Started)
}

// levelInterval is how often the leader looks whether everybody knows more than
// the cluster uses.
const levelInterval = 10 * time.Second

// raiseLevel raises the feature level of the cluster to what every server and
// every node that has joined knows. It runs on the server that leads.
func (m *member) raiseLevel(ctx context.Context) error {
	for {
		if err := m.raiseOnce(ctx); err != nil && ctx.Err() == nil {
			m.log.WarnContext(ctx, "the feature level of the cluster could not be raised; trying again", slog.Any("error", err))
		}
		if !pause(ctx, levelInterval) {
			return nil
		}
	}
}

func (m *member) raiseOnce(ctx context.Context) error {
	known := knownLevel(m.state.Snapshot())
	if known <= m.state.Snapshot().FeatureLevel() {
		return nil
	}
	_, err := m.state.Update(ctx, func(tx *state.Tx) error {
		cluster, ok := state.Clusters.Get(tx, state.Singleton{})
		if !ok || cluster.Err != nil || cluster.Value.FeatureLevel >= known {
			return cluster.Err
		}
		cluster.Value.FeatureLevel = known
		if err := state.Clusters.Put(tx, state.Singleton{}, cluster.Value); err != nil {
			return fmt.Errorf("raise the feature level to %d: %w", known, err)
		}
		return nil
	})
	if err == nil {
		m.log.InfoContext(ctx, "every member knows more: the feature level of the cluster was raised", slog.Int("feature_level", known))
	}
	return err //nolint:wrapcheck // says what was done
}

// knownLevel returns the newest feature level that all servers and nodes know.
func knownLevel(s *state.Snapshot) int {
	level := catalog.FeatureLevel
	for _, server := range state.Servers.All(s) {
		if server.Err != nil {
			return 0
		}
		if server.Value.ID != "" {
			level = min(level, server.Value.FeatureLevel)
		}
	}
	for _, node := range state.NodeStatuses.All(s) {
		if node.Err != nil {
			return 0
		}
		level = min(level, max(1, node.Value.FeatureLevel))
	}
	return level
}
