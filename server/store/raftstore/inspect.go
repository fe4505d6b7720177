package raftstore

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// Inspection is what the state directory of a stopped server holds.
type Inspection struct {
	// Last and Term are those of the newest entry of the log, or of the newest
	// snapshot if that is newer. Of several servers, the one with the greater term,
	// and with equal terms the greater index, has all that the others have.
	Last, Term uint64
	// Members is the newest list of servers in it.
	Members []Member
}

// Inspect reads the state directory of the stopped server id. Errors are those of
// Recover.
func Inspect(dir, id string) (found Inspection, err error) {
	cfg := Config{Dir: dir, ID: id}.withDefaults()
	logger := hclog.NewNullLogger()
	d, err := openDisk(cfg, logger, func(error) {}, &watchdog{})
	if err != nil {
		return found, fmt.Errorf("inspect %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, d.close()) }()
	known, err := raft.HasExistingState(d.log, d.log, d.snapshots)
	if err != nil || !known {
		return found, errors.Join(fmt.Errorf("%w: inspect %s: there is no state", store.ErrInvalid, dir), err)
	}
	snapshots, err := d.snapshots.List()
	if err != nil {
		return found, fmt.Errorf("inspect %s: list the snapshots: %w", dir, err)
	}
	if len(snapshots) > 0 {
		found.Last, found.Term = snapshots[0].Index, snapshots[0].Term
	}
	last, err := d.log.LastIndex()
	if err != nil {
		return found, fmt.Errorf("inspect %s: %w", dir, err)
	}
	if last > found.Last {
		var entry raft.Log
		if err := d.log.GetLog(last, &entry); err != nil {
			return found, fmt.Errorf("inspect %s: %w", dir, err)
		}
		found.Last, found.Term = entry.Index, entry.Term
	}
	e, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return found, fmt.Errorf("inspect %s: %w", dir, err)
	}
	_, transport := raft.NewInmemTransport(loneAddress)
	list, err := raft.GetConfiguration(e.raftConfig(logger), e.newMachine(), d.log, d.log, d.snapshots, transport)
	if err != nil {
		return found, fmt.Errorf("inspect %s: read the list of servers: %w", dir, err)
	}
	for _, s := range list.Servers {
		found.Members = append(found.Members, Member{ID: string(s.ID), Address: string(s.Address)})
	}
	return found, nil
}
