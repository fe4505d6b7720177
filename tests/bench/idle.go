package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/tests/bench/load"
)

// crowd is connections of other proxies to one, all idle.
type crowd struct {
	name   string
	pids   []int
	conns  []*tls.Conn
	before uint64 // private memory without them
}

// idle measures what connections cost that have carried one request and then
// nothing.
func (f *field) idle(ctx context.Context, r *report) (err error) {
	var crowds []*crowd
	defer func() {
		for _, c := range crowds {
			for _, conn := range c.conns {
				err = errors.Join(err, ignoreClosed(conn.Close()))
			}
		}
	}()
	for _, l := range f.lanes {
		far := l.parts[len(l.parts)-1]
		if l.scenario != mutual || far.mesh == "" {
			continue
		}
		c := &crowd{name: l.name, pids: far.pids}
		crowds = append(crowds, c)
		if err := f.gather(ctx, c, far.mesh); err != nil {
			return fmt.Errorf("idle connections to %s: %w", l.name, err)
		}
	}
	fmt.Fprintf(os.Stderr, "bench: %d connections to each are idle for %s\n", f.options.idleConns, f.options.idleFor)
	timer := time.NewTimer(f.options.idleFor)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, c := range crowds {
		after, err := load.MemoryOf(c.pids)
		if err != nil {
			return err
		}
		each := (float64(after.Private) - float64(c.before)) / float64(len(c.conns))
		r.Idle = append(r.Idle, memory{Scenario: mutual, Name: c.name, Role: "far", Bytes: each})
	}
	return nil
}

// ignoreClosed forgets that the other side was first.
func ignoreClosed(err error) error {
	if _, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err); ok {
		return nil
	}
	return err
}

// gather opens the connections, one after the other, each with one request.
func (f *field) gather(ctx context.Context, c *crowd, address string) error {
	cert, err := tls.LoadX509KeyPair(f.path("near.pem"), f.path("near.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(f.authority.RootPEM())
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"},
		ServerName: proxy.ServerName(meshPort, instance(0), clusterName(httpCluster), catalog.DefaultNamespace),
		// Peers are known by a URI. Whom this client talks to does not matter here.
		InsecureSkipVerify: true,
	}}
	before, err := load.MemoryOf(c.pids)
	if err != nil {
		return err
	}
	c.before = before.Private
	for range f.options.idleConns {
		nc, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		conn, ok := nc.(*tls.Conn)
		if !ok {
			return errors.New("not TLS")
		}
		c.conns = append(c.conns, conn)
		if err := once(conn); err != nil {
			return err
		}
	}
	return nil
}

// once sends one request and reads the answer.
func once(conn *tls.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "GET "+load.SmallPath+" HTTP/1.1\r\nHost: api.default.mesh\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || n != load.SmallLength {
		return fmt.Errorf("status %d and %d bytes", resp.StatusCode, n)
	}
	return nil
}
