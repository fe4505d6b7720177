package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/meshd/meshd/server/store/raftstore"
)

// ErrNoState is wrapped when there is no state of a cluster in data_dir.
var ErrNoState = errors.New("there is no state of a cluster")

// Recovery is what the state of a stopped server holds, and what Recover makes of it.
type Recovery struct {
	raftstore.Inspection
	// Name is the server's, and Address where the other servers will find it.
	Name, Address string

	dir, id string
}

// Inspect reads the state of a stopped server.
func Inspect(ctx context.Context, config Config) (Recovery, error) {
	if err := config.Validate(); err != nil {
		return Recovery{}, fmt.Errorf("configuration of the server: %w", err)
	}
	config = config.withDefaults()
	r := Recovery{dir: storeDir(config)}
	if _, err := os.Stat(r.dir); err != nil {
		return r, fmt.Errorf("%w in %s: %w", ErrNoState, config.DataDir, err)
	}
	var err error
	if r.Name, err = serverName(config.Name, config.DataDir); err != nil {
		return r, err
	}
	host, _, err := config.advertised(ctx, &net.TCPAddr{IP: net.ParseIP(config.Bind), Port: int(config.Port)})
	if err != nil {
		return r, err
	}
	r.Address = net.JoinHostPort(host, fmt.Sprint(config.PeerPort))
	if r.id, err = raftstore.Identify(r.dir, r.Name); err != nil {
		return r, fmt.Errorf("read the state: %w", err)
	}
	if r.Inspection, err = raftstore.Inspect(r.dir, r.id); err != nil {
		return r, fmt.Errorf("read the state: %w", err)
	}
	return r, nil
}

// Recover makes the server that was inspected the only member of its cluster, from
// its next start on. It is for the day on which most servers are lost for ever; what
// was acknowledged and is not in this state is lost with them.
func (r Recovery) Recover() error {
	if err := raftstore.Recover(r.dir, r.id, []raftstore.Member{{ID: r.id, Address: r.Address}}); err != nil {
		return fmt.Errorf("make %s the only server: %w", r.Name, err)
	}
	return nil
}
