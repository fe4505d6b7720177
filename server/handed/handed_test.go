package handed_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"

	"github.com/meshd/meshd/server/handed"
)

func TestQueue(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer func() { _, _ = a.Close(), b.Close() }() // a pipe's end never fails
	q := handed.NewQueue(a.LocalAddr())
	taken := make(chan net.Conn, 1)
	go func() {
		c, err := q.Accept()
		if err != nil {
			t.Error(err)
		}
		taken <- c
	}()
	if !q.Put(t.Context(), a) {
		t.Error("an open queue takes nothing")
	}
	if c := <-taken; c != a {
		t.Errorf("accepted %v", c)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if q.Put(ended, b) {
		t.Error("taken after its time, by nobody")
	}
	if err := errors.Join(q.Close(), q.Close()); err != nil {
		t.Error(err)
	}
	if q.Put(t.Context(), b) {
		t.Error("taken by a closed queue")
	}
	if _, err := q.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept of a closed queue: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer func() { _, _ = a.Close(), b.Close() }() // a pipe's end never fails
	var c handed.Credentials
	if _, _, err := c.ServerHandshake(a); !errors.Is(err, handed.ErrNoTLS) {
		t.Errorf("plain text at a server: %v", err)
	}
	if _, _, err := c.ClientHandshake(t.Context(), "x", b); !errors.Is(err, handed.ErrNoTLS) {
		t.Errorf("plain text at a client: %v", err)
	}
	secure := tls.Server(a, &tls.Config{MinVersion: tls.VersionTLS13})
	if conn, info, err := c.ServerHandshake(secure); err != nil || conn != net.Conn(secure) || info.AuthType() != "tls" {
		t.Errorf("a TLS connection: %v, %v, %v", conn, info, err)
	}
}
