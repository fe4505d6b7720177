package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
)

// Config says where an engine keeps its state and how it reaches its peers. The zero
// value of every field but Dir and ID is usable.
type Config struct {
	// Dir is the state directory. It is created with mode 0700 if it does not
	// exist; one that others than its owner can enter is refused. One engine at
	// a time uses it.
	Dir string
	// ID names this server for ever. Renaming it makes it another member.
	ID string
	// Transport connects the members. Nil is for a lone server: it talks to
	// itself inside of the process and founds its cluster by itself. The engine
	// closes a transport that has a Close method.
	Transport raft.Transport
	// Forward hands a request to Serve of the member id at address, the leader,
	// and returns its reply. An error that wraps store.ErrNoLeader says that
	// nothing was sent; after any other the leader may have done what it was asked.
	// Nil is for members that do not serve while another one leads.
	Forward func(ctx context.Context, id, address string, request []byte) (reply []byte, err error)

	// HeartbeatTimeout is how long a follower waits for its leader, Election-
	// Timeout how long a candidate waits for votes, LeaderLease how long a leader
	// goes on without a majority. 0 means 500, 500 and 250 ms: with them a killed
	// leader was replaced within 650 to 1257 ms, without a false election under
	// 45 s of CPU overload.
	HeartbeatTimeout time.Duration
	ElectionTimeout  time.Duration
	LeaderLease      time.Duration
	// CommitInterval is after how long without a write followers are told what is
	// committed, and how often again. 0 means 10 ms.
	CommitInterval time.Duration

	// SegmentBytes is the size of a file of the log. Two of them are allocated in
	// advance, so that a full disk does not stop the log in the middle. 0 means
	// 64 MiB.
	SegmentBytes int
	// SnapshotEntries is after how many log entries the state is saved and the
	// log cut; SnapshotInterval is how often that is looked at; TrailingEntries
	// stay in the log for members that lag. 0 means 8192, 30 s and 10240.
	SnapshotEntries  uint64
	SnapshotInterval time.Duration
	TrailingEntries  uint64

	left func(dir string) (uint64, error) // how much room there is; tests have their own
}

// Member is a server of a cluster.
type Member struct {
	ID      string
	Address string // in the form that the Transport dials
}

// loneAddress is where a server without a Transport finds itself.
const loneAddress = "local"

// minSegment is the smallest log file that holds a transaction of maximal size
// with room for its frame.
const minSegment = 1 << 20

func (c Config) withDefaults() Config {
	set(&c.HeartbeatTimeout, 500*time.Millisecond)
	set(&c.ElectionTimeout, 500*time.Millisecond)
	set(&c.LeaderLease, 250*time.Millisecond)
	set(&c.CommitInterval, 10*time.Millisecond)
	set(&c.SegmentBytes, 64<<20)
	set(&c.SnapshotEntries, 8192)
	set(&c.SnapshotInterval, fault.SnapshotInterval(30*time.Second))
	set(&c.TrailingEntries, 10240)
	if c.left == nil {
		c.left = left
	}
	return c
}

func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate returns all that is wrong with c, each with the name of its field.
func (c Config) Validate() error {
	d := c.withDefaults()
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	wrong(d.Dir == "", "Dir: name the state directory")
	wrong(d.ID == "", "ID: name this server")
	wrong(d.SegmentBytes < minSegment, "SegmentBytes: %d is less than %d", d.SegmentBytes, minSegment)
	wrong(d.HeartbeatTimeout < 5*time.Millisecond, "HeartbeatTimeout: %v is less than 5ms", d.HeartbeatTimeout)
	wrong(d.ElectionTimeout < d.HeartbeatTimeout, "ElectionTimeout: %v is less than HeartbeatTimeout, %v", d.ElectionTimeout, d.HeartbeatTimeout)
	wrong(d.LeaderLease < 5*time.Millisecond, "LeaderLease: %v is less than 5ms", d.LeaderLease)
	wrong(d.LeaderLease > d.HeartbeatTimeout, "LeaderLease: %v is more than HeartbeatTimeout, %v", d.LeaderLease, d.HeartbeatTimeout)
	wrong(d.SnapshotInterval < 5*time.Millisecond, "SnapshotInterval: %v is less than 5ms", d.SnapshotInterval)
	wrong(d.CommitInterval < time.Millisecond, "CommitInterval: %v is less than 1ms", d.CommitInterval)
	return errors.Join(errs...)
}
