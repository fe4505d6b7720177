package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/meshd/meshd/tests/bench/server/drive"
)

var errNoLeader = errors.New("no member leads")

// measure runs one job of writes in a process of its own.
func (o options) measure(ctx context.Context, c *cluster) (out drive.Result, err error) {
	if err := c.alive(); err != nil {
		return out, err
	}
	if c.to, err = c.target(ctx); err != nil {
		return out, err
	}
	job := drive.Job{
		Target: c.to, Clients: o.clients, Keys: o.keys, Bytes: o.bytes, Prefix: c.prefix(),
		Warmup: o.warmup, Window: o.window, Processes: c.pids(),
	}
	input, err := json.Marshal(job)
	if err != nil {
		return out, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, o.self, driveCommand)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return out, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return out, json.Unmarshal(stdout.Bytes(), &out)
}

// writes measures the stores in turn. Each round begins with another one.
func (o options) writes(ctx context.Context, r *report, clusters []*cluster) error {
	for round := range o.rounds {
		for i := range clusters {
			c := clusters[(i+round)%len(clusters)]
			out, err := o.measure(ctx, c)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err != nil: // the others go on
				r.fail(fmt.Sprintf("writes to %s, round %d: %v", c.name, round+1, err))
			default:
				r.Writes = append(r.Writes, writes{Name: c.name, Round: round, Result: out})
				fmt.Fprintf(os.Stderr, "bench-server: round %d of %d: %s: %.0f/s, p50 %.1f ms, p99 %.1f ms, CPU per write: servers %.0f µs, client %.0f µs, failed %d\n",
					round+1, o.rounds, c.name, out.PerSecond(), p50(out), p99(out), serverCPU(out), clientCPU(out), out.Failed)
			}
		}
	}
	return nil
}
