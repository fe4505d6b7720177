package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"time"

	"github.com/meshd/meshd/tests/bench/server/drive"
)

// recovery is how long it took until the next write was acknowledged.
type recovery struct {
	Name string        `json:"name"`
	Run  int           `json:"run"`
	Took time.Duration `json:"took"`
}

const (
	// tryTimeout is how long a client waits for an answer before it asks again, on
	// a new connection if need be.
	tryTimeout = 250 * time.Millisecond
	// tryPause follows a refusal.
	tryPause = 5 * time.Millisecond
	// phase is the least time between a recovery and the next blow, and how much
	// longer it may be; another store's turn comes in between, too.
	phase = 250 * time.Millisecond
	// recoverTimeout is when a run counts as failed.
	recoverTimeout = 30 * time.Second
)

var errRecovery = errors.New("no write was acknowledged")

// strike does something to the leader and measures how long it takes until a
// write through one of the other servers is acknowledged. The clients' connections
// are there before.
func (c *cluster) strike(ctx context.Context, blow func(*process) error) (took time.Duration, leader int, err error) {
	// Raft looks for a silent leader at intervals that are random, but begin with
	// the last election. So the blow must not follow the election at once.
	if err = rest(ctx, phase+rand.N(phase)); err != nil {
		return 0, 0, err
	}
	if leader, err = c.leader(ctx); err != nil {
		return 0, 0, err
	}
	var writers []drive.Writer
	for i := range c.servers {
		if i == leader {
			continue
		}
		to := c.to
		to.Addresses = []string{c.address(i)}
		w, err := to.Open(0)
		if err != nil {
			return 0, leader, err
		}
		defer w.Close()
		one, cancel := context.WithTimeout(ctx, time.Second)
		_, _ = c.write(one, w) // bare Raft's followers refuse, but are connected then
		cancel()
		writers = append(writers, w)
	}
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	acked := make(chan time.Time, len(writers))
	began := time.Now()
	if err := blow(c.servers[leader]); err != nil {
		return 0, leader, err
	}
	done := make(chan struct{}, len(writers))
	for _, w := range writers {
		go func() {
			defer func() { done <- struct{}{} }()
			if at, ok := c.persist(ctx, w); ok {
				acked <- at
				cancel() // the others need not go on
			}
		}()
	}
	for range writers {
		<-done
	}
	select {
	case at := <-acked:
		return at.Sub(began), leader, nil
	default:
		return 0, leader, fmt.Errorf("%w by %s within %s", errRecovery, c.name, recoverTimeout)
	}
}

// write writes one key that nobody has written.
func (c *cluster) write(ctx context.Context, w drive.Writer) (uint64, error) {
	key := c.prefix()
	return w.Write(ctx, key, drive.Value(key, 0, minBytes), 0)
}

// persist writes until it is acknowledged.
func (c *cluster) persist(ctx context.Context, w drive.Writer) (time.Time, bool) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	<-pause.C
	for ctx.Err() == nil {
		one, cancel := context.WithTimeout(ctx, tryTimeout)
		_, err := c.write(one, w)
		cancel()
		if err == nil {
			return time.Now(), true
		}
		pause.Reset(tryPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
	}
	return time.Time{}, false
}

// heal waits until every server serves again.
func (c *cluster) heal(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for i := range c.servers {
		if err := c.serves(ctx, i); err != nil {
			return err
		}
	}
	_, err := c.leader(ctx)
	return err
}

// kills kills the leader of each store in turn. While one is struck, the others
// are whole.
func (o options) kills(ctx context.Context, r *report, clusters []*cluster) error {
	for run := range o.killRuns {
		for _, c := range clusters {
			took, leader, err := c.strike(ctx, (*process).kill)
			if err == nil {
				r.Kills = append(r.Kills, recovery{Name: c.name, Run: run, Took: took})
				fmt.Fprintf(os.Stderr, "bench-server: %s kill %d of %d: %s: server %d, %.0f ms\n",
					time.Now().Format(time.StampMilli), run+1, o.killRuns, c.name, leader+1, millis(took))
			} else {
				r.fail(fmt.Sprintf("leader of %s killed, run %d: %v", c.name, run+1, err))
			}
			if err := errors.Join(c.restart(leader), c.heal(ctx)); err != nil {
				return fmt.Errorf("restart a server of %s: %w", c.name, err)
			}
		}
	}
	return nil
}

// stops stops the leader for a while, as a machine that hangs.
func (o options) stops(ctx context.Context, r *report, clusters []*cluster) error {
	for run := range o.stopRuns {
		for _, c := range clusters {
			took, leader, err := c.strike(ctx, func(p *process) error { return p.signal(syscall.SIGSTOP) })
			if err == nil {
				r.Stops = append(r.Stops, recovery{Name: c.name, Run: run, Took: took})
				fmt.Fprintf(os.Stderr, "bench-server: stop %d of %d: %s: %.0f ms\n", run+1, o.stopRuns, c.name, millis(took))
			} else {
				r.fail(fmt.Sprintf("leader of %s stopped, run %d: %v", c.name, run+1, err))
			}
			if err := errors.Join(c.servers[leader].signal(syscall.SIGCONT), c.heal(ctx)); err != nil {
				return fmt.Errorf("continue a server of %s: %w", c.name, err)
			}
		}
	}
	return nil
}
