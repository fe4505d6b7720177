package raftstore

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// Recover rewrites the list of servers in the state directory of the stopped
// server id: from its next start on, members are the cluster, this one among them.
// It is for the day on which most servers are lost for ever. All that is in its log
// counts as committed. So keep one state, that with the longest log, name its
// server as the only member, and let the others join with empty directories: the
// ends of two logs may hold different writes at the same place. What was
// acknowledged and is not in the kept state is lost. The servers that are left out
// must never run again with their old state: they would not know that they are out.
//
// Errors: ErrInUse while a server uses the directory, store.ErrCorrupt,
// store.ErrInvalid for a list without this server or a directory without a state.
// After an error the list is the old one.
func Recover(dir, id string, members []Member) (err error) {
	if !slices.ContainsFunc(members, func(m Member) bool { return m.ID == id }) {
		return fmt.Errorf("%w: recover %s without its own server, %q", store.ErrInvalid, dir, id)
	}
	cfg := Config{Dir: dir, ID: id}.withDefaults()
	logger := hclog.NewNullLogger()
	failed := make(chan error, 1)
	fatal := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	d, err := openDisk(cfg, logger, fatal, &watchdog{})
	if err != nil {
		return fmt.Errorf("recover %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, d.close()) }()
	known, err := raft.HasExistingState(d.log, d.log, d.snapshots)
	if err != nil {
		return fmt.Errorf("recover %s: look for a state: %w", dir, err)
	}
	if !known {
		return fmt.Errorf("%w: recover %s: there is no state", store.ErrInvalid, dir)
	}
	e, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return fmt.Errorf("recover %s: %w", dir, err)
	}
	raftCfg := e.raftConfig(logger)
	_, transport := raft.NewInmemTransport(loneAddress)
	m := &machine{
		space: e.space, fatal: fatal, counts: &e.counts, moved: func() {}, arrived: func() {}, reached: func(uint64) {},
		configured: func(raft.Configuration) {}, verify: func(uint64) {},
	}
	if err := raft.RecoverCluster(raftCfg, m, d.log, d.log, d.snapshots, transport, configuration(members)); err != nil {
		return fmt.Errorf("recover %s: %w", dir, err)
	}
	select {
	case err := <-failed:
		return fmt.Errorf("recover %s: %w", dir, err)
	default:
		return nil
	}
}
