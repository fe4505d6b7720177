package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/meshd/meshd/tests/bench/server/drive"
)

// Patience while nothing is measured.
const (
	startTimeout = 60 * time.Second
	pollPause    = 10 * time.Millisecond
)

// view is what one server thinks of its cluster.
type view struct {
	leads bool
	led   bool   // it knows a leader
	term  uint64 // 0: it does not tell
}

// store is a replicated store whose servers run on this machine.
type store interface {
	// launch starts the server of that number; its directory may hold a state.
	launch(number int) (*process, error)
	// target is how to write, once all servers run.
	target(ctx context.Context) (drive.Target, error)
	// look asks one server.
	look(ctx context.Context, number int) (view, error)
	// address is where a client finds one server.
	address(number int) string
}

// cluster is the servers of a store, which run.
type cluster struct {
	store

	name    string
	servers []*process
	to      drive.Target
	serial  atomic.Uint64 // of keys
}

// begin starts n servers and waits until they take writes.
func begin(ctx context.Context, name string, s store, n int) (*cluster, error) {
	c := &cluster{store: s, name: name}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for i := range n {
		p, err := s.launch(i)
		if err != nil {
			return c, err
		}
		c.servers = append(c.servers, p)
	}
	err := retry(ctx, c.alive, func() (err error) {
		c.to, err = s.target(ctx)
		return err
	})
	for i := range n {
		err = errors.Join(err, c.serves(ctx, i))
	}
	if err != nil {
		return c, fmt.Errorf("start %s: %w", name, err)
	}
	return c, nil
}

// retry tries again until ctx ends or something that should live is dead.
func retry(ctx context.Context, alive, try func() error) error {
	ticker := time.NewTicker(pollPause)
	defer ticker.Stop()
	var err error
	for {
		now := try()
		if now == nil {
			return nil
		}
		if ctx.Err() == nil || err == nil { // else the error is only that
			err = now
		}
		if dead := alive(); dead != nil {
			return errors.Join(err, dead)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return err
		}
	}
}

func (c *cluster) alive() error {
	var errs []error
	for _, p := range c.servers {
		errs = append(errs, p.alive())
	}
	return errors.Join(errs...)
}

func (c *cluster) pids() []int {
	var out []int
	for _, p := range c.servers {
		out = append(out, p.pid())
	}
	return out
}

// prefix is of keys that nobody has used.
func (c *cluster) prefix() string {
	return fmt.Sprintf("b%d", c.serial.Add(1))
}

// serves waits until one server knows a leader.
func (c *cluster) serves(ctx context.Context, number int) error {
	return retry(ctx, c.alive, func() error {
		one, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		v, err := c.look(one, number)
		if err == nil && !v.led {
			err = fmt.Errorf("server %d of %s knows no leader", number+1, c.name)
		}
		return err
	})
}

// leader waits until one server says that it leads.
func (c *cluster) leader(ctx context.Context) (int, error) {
	found := 0
	err := retry(ctx, c.alive, func() error {
		var errs []error
		for i := range c.servers {
			one, cancel := context.WithTimeout(ctx, time.Second)
			v, err := c.look(one, i)
			cancel()
			if err == nil && v.leads {
				found = i
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(append(errs, fmt.Errorf("no server of %s leads", c.name))...)
	})
	return found, err
}

// restart starts a server that was killed.
func (c *cluster) restart(number int) error {
	p, err := c.launch(number)
	if err == nil {
		c.servers[number] = p
	}
	return err
}

// close ends all servers.
func (c *cluster) close() error {
	if c == nil {
		return nil
	}
	for _, p := range c.servers {
		_ = p.signal(syscall.SIGCONT) // it may be gone
	}
	var errs []error
	for _, p := range c.servers {
		errs = append(errs, p.stop())
	}
	return errors.Join(errs...)
}

// folder makes a directory of a server.
func folder(dir, name string, number int) (string, error) {
	path := filepath.Join(dir, fmt.Sprintf("%s-%d", name, number+1))
	return path, os.MkdirAll(path, 0o700)
}
