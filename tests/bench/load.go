package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/tests/conformance/rig"
)

// size is a kind of response.
type size struct {
	name, path string
	bytes      int
}

func sizes() []size {
	return []size{{"100 B", "/100", 100}, {"10 KiB", "/10k", 10 << 10}}
}

// sample is one measurement.
type sample struct {
	requests int
	rps      float64
	p50, p99 time.Duration
	// cost is by process, in the contender's order: CPU per request, and
	// memory at the end.
	cost []rig.Cost
}

// measure loads one contender and returns what that cost. The load generator
// is this process, whose own CPU is not counted, though it takes its share of
// the machine.
func measure(ctx context.Context, c contender, s size, o options) (sample, error) {
	var d net.Dialer
	conns := make([]net.Conn, 0, o.connections)
	defer func() {
		for _, nc := range conns {
			_ = nc.Close() // nothing is under way any more
		}
	}()
	for range o.connections {
		nc, err := d.DialContext(ctx, "tcp", c.address)
		if err != nil {
			return sample{}, err
		}
		conns = append(conns, nc)
	}
	from := time.Now().Add(o.warmup)
	until := from.Add(o.duration)
	latencies := make([][]time.Duration, len(conns))
	g, ctx := errgroup.WithContext(ctx)
	for i, nc := range conns {
		g.Go(func() error {
			var err error
			latencies[i], err = drive(nc, s, from, until)
			return err
		})
	}
	var before, after []rig.Cost
	g.Go(func() error {
		var err error
		if err = waitUntil(ctx, from); err != nil {
			return err
		}
		if before, err = c.costs(); err != nil {
			return err
		}
		if err = waitUntil(ctx, until); err != nil {
			return err
		}
		after, err = c.costs()
		return err
	})
	if err := g.Wait(); err != nil {
		return sample{}, err
	}
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		return sample{}, errors.New("no request was answered")
	}
	slices.Sort(all)
	out := sample{
		requests: len(all), rps: float64(len(all)) / o.duration.Seconds(),
		p50: all[len(all)/2], p99: all[len(all)*99/100], cost: after,
	}
	for i := range out.cost {
		out.cost[i].CPU = (after[i].CPU - before[i].CPU) / time.Duration(len(all))
	}
	return out, nil
}

func waitUntil(ctx context.Context, t time.Time) error {
	timer := time.NewTimer(time.Until(t))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// drive sends requests on one connection, one after the other, and returns the
// latencies of those that were answered within the window.
func drive(nc net.Conn, s size, from, until time.Time) ([]time.Duration, error) {
	if err := nc.SetDeadline(until.Add(10 * time.Second)); err != nil {
		return nil, err
	}
	request := []byte("GET " + s.path + " HTTP/1.1\r\nHost: app.mesh\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	buf := make([]byte, 64<<10)
	out := make([]time.Duration, 0, 4096)
	for {
		began := time.Now()
		if began.After(until) {
			return out, nil
		}
		if _, err := nc.Write(request); err != nil {
			return nil, err
		}
		if err := readResponse(nc, buf, s.bytes); err != nil {
			return nil, err
		}
		if ended := time.Now(); ended.After(from) && ended.Before(until) {
			out = append(out, ended.Sub(began))
		}
	}
}

// readResponse reads one response of a known length, and checks that it is it.
func readResponse(nc net.Conn, buf []byte, length int) error {
	n := 0
	for {
		m, err := nc.Read(buf[n:])
		if n += m; err != nil {
			return fmt.Errorf("after %d bytes of a response: %w", n, err)
		}
		end := bytes.Index(buf[:n], []byte("\r\n\r\n"))
		if end < 0 {
			continue
		}
		if !bytes.HasPrefix(buf, []byte("HTTP/1.1 200 ")) {
			return fmt.Errorf("answered %.200q", buf[:n])
		}
		if got, err := contentLength(buf[:end]); err != nil || got != length {
			return fmt.Errorf("%d bytes, want %d: %w", got, length, err)
		}
		for want := end + 4 + length; n < want; {
			m, err := nc.Read(buf[n:])
			if n += m; err != nil {
				return fmt.Errorf("after %d of %d bytes of a response: %w", n, want, err)
			}
		}
		if n != end+4+length {
			return errors.New("more bytes than the response has")
		}
		return nil
	}
}

func contentLength(head []byte) (int, error) {
	for line := range bytes.SplitSeq(head, []byte("\r\n")) {
		if len(line) > 15 && bytes.EqualFold(line[:15], []byte("content-length:")) {
			return strconv.Atoi(string(bytes.TrimSpace(line[15:])))
		}
	}
	return 0, errors.New("no content-length")
}
