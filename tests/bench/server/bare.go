package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/meshd/meshd/tests/bench/server/bareraft"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

// The timers of meshd's servers: those of raftstore.Config.
const (
	raftHeartbeat = 500 * time.Millisecond
	raftElection  = 500 * time.Millisecond
	raftLease     = 250 * time.Millisecond
)

// bareStore is package bareraft, which this program serves itself.
type bareStore struct {
	self    string
	dir     string
	members []bareraft.Member
}

const (
	barePeerPort   = "7301"
	bareClientPort = "7300"
)

func newBareStore(self, dir string, hosts []string) *bareStore {
	b := &bareStore{self: self, dir: dir}
	for _, host := range hosts {
		b.members = append(b.members, bareraft.Member{Peer: net.JoinHostPort(host, barePeerPort), Client: net.JoinHostPort(host, bareClientPort)})
	}
	return b
}

func (b *bareStore) launch(number int) (*process, error) {
	dir, err := folder(b.dir, "raft", number)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(bareraft.Config{
		Dir: dir, Self: number, Members: b.members, Heartbeat: raftHeartbeat, Election: raftElection, Lease: raftLease,
	})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	return launch(filepath.Join(dir, "log"), b.self, raftCommand, file)
}

func (b *bareStore) address(number int) string { return b.members[number].Client }

// target is the leader: no other member writes.
func (b *bareStore) target(ctx context.Context) (drive.Target, error) {
	t := drive.Target{System: drive.Raft}
	for i := range b.members {
		v, err := b.look(ctx, i)
		if err != nil {
			return t, err
		}
		if v.leads {
			t.Addresses = []string{b.address(i)}
		}
	}
	if len(t.Addresses) == 0 {
		return t, errNoLeader
	}
	return t, nil
}

func (b *bareStore) look(ctx context.Context, number int) (view, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", b.address(number))
	if err != nil {
		return view{}, err
	}
	c := bareraft.NewClient(conn)
	defer c.Close()
	leads, led, term, err := c.State(ctx)
	return view{leads: leads, led: led, term: term}, err
}
