// Package bareraft is hashicorp/raft with nothing around it: members that store
// keys in a map and take writes over plain TCP, without authentication, from
// clients on the same machine. It shows what Raft and the disk cost, and how long
// an election takes, so that what a product adds can be told.
package bareraft

import (
	"bufio"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
)

// Config is one member.
type Config struct {
	Dir string `json:"dir"`
	// Self is the number of this member in Members.
	Self    int      `json:"self"`
	Members []Member `json:"members"`
	// Heartbeat, Election and Lease are Raft's timers.
	Heartbeat time.Duration `json:"heartbeat"`
	Election  time.Duration `json:"election"`
	Lease     time.Duration `json:"lease"`
}

// Member is where a member is: for the others, and for clients.
type Member struct {
	Peer   string `json:"peer"`
	Client string `json:"client"`
}

const (
	poolSize      = 3
	ioTimeout     = 10 * time.Second
	enqueueing    = 10 * time.Second
	snapshotsKept = 2
)

// Run serves until ctx ends. The state directory is made by the first run.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "wal"), 0o700); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	self := cfg.Members[cfg.Self]
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr})
	log, err := wal.Open(filepath.Join(cfg.Dir, "wal"), wal.WithLogger(logger))
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	snapshots, err := raft.NewFileSnapshotStoreWithLogger(cfg.Dir, snapshotsKept, logger)
	if err != nil {
		return fmt.Errorf("open the snapshots: %w", err)
	}
	transport, err := raft.NewTCPTransportWithLogger(self.Peer, nil, poolSize, ioTimeout, logger)
	if err != nil {
		return fmt.Errorf("listen for members: %w", err)
	}
	defer func() { err = errors.Join(err, transport.Close()) }()
	r, err := start(cfg, log, snapshots, transport, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Shutdown().Error()) }()
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", self.Client)
	if err != nil {
		return fmt.Errorf("listen for clients: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = listener.Close() })() // wakes Accept
	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept clients: %w", err)
		}
		clients.Go(func() {
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // wakes its reader
			serve(r, conn)
		})
	}
}

func start(cfg Config, log *wal.WAL, snapshots raft.SnapshotStore, transport raft.Transport, logger hclog.Logger) (*raft.Raft, error) {
	rc := raft.DefaultConfig()
	rc.LocalID = raft.ServerID(cfg.Members[cfg.Self].Peer)
	rc.Logger = logger
	rc.HeartbeatTimeout, rc.ElectionTimeout, rc.LeaderLeaseTimeout = cfg.Heartbeat, cfg.Election, cfg.Lease
	known, err := raft.HasExistingState(log, log, snapshots)
	if err != nil {
		return nil, fmt.Errorf("look for a state: %w", err)
	}
	if !known {
		var servers raft.Configuration
		for _, m := range cfg.Members {
			servers.Servers = append(servers.Servers, raft.Server{ID: raft.ServerID(m.Peer), Address: raft.ServerAddress(m.Peer)})
		}
		if err := raft.BootstrapCluster(rc, log, log, snapshots, transport, servers); err != nil {
			return nil, fmt.Errorf("begin the cluster: %w", err)
		}
	}
	r, err := raft.NewRaft(rc, &machine{values: map[string]entry{}}, log, log, snapshots, transport)
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	return r, nil
}

// machine is the map. Raft calls it from one goroutine at a time.
type machine struct{ values map[string]entry }

type entry struct {
	Value    []byte
	Revision uint64
}

// Apply implements raft.FSM. The result is the new revision, or 0 if the key had
// another one than expected.
func (m *machine) Apply(l *raft.Log) any {
	set, err := decode(l.Data)
	if err != nil || m.values[set.key].Revision != set.expect {
		return uint64(0)
	}
	m.values[set.key] = entry{Value: set.value, Revision: l.Index}
	return l.Index
}

// Snapshot implements raft.FSM.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	return saved(maps.Clone(m.values)), nil
}

// Restore implements raft.FSM.
func (m *machine) Restore(r io.ReadCloser) error {
	values := map[string]entry{}
	if err := gob.NewDecoder(r).Decode(&values); err != nil {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	m.values = values
	return r.Close()
}

type saved map[string]entry

// Persist implements raft.FSMSnapshot.
func (s saved) Persist(sink raft.SnapshotSink) error {
	w := bufio.NewWriter(sink)
	if err := errors.Join(gob.NewEncoder(w).Encode(map[string]entry(s)), w.Flush()); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (saved) Release() {}
