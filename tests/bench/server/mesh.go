package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

const (
	trustDomain = "bench.example.com"
	meshPort    = "7400"
	peerPort    = "7401"
)

// meshStore is meshd's servers as they come.
type meshStore struct {
	program string
	dir     string
	hosts   []string // one loopback address for each server
	token   string
	roots   ca.Bundle
}

func newMeshStore(program, dir string, hosts []string) (*meshStore, error) {
	m := &meshStore{program: program, dir: dir, hosts: hosts, token: rand.Text() + rand.Text()}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := errors.Join(ca.WriteClusterKey(m.path("cluster.key"), ca.GenerateClusterKey()),
		os.WriteFile(m.path("admin.token"), []byte(m.token+"\n"), 0o600)); err != nil {
		return nil, err
	}
	for i := range hosts {
		if err := os.WriteFile(m.path(m.name(i)+".hcl"), m.config(i), 0o600); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *meshStore) path(name string) string { return filepath.Join(m.dir, name) }
func (m *meshStore) name(number int) string  { return fmt.Sprintf("s%d", number+1) }

func (m *meshStore) config(number int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "trust_domain = %q\nname = %q\n", trustDomain, m.name(number))
	fmt.Fprintf(&b, "data_dir = %q\nadmin_socket = %q\n", m.path("data-"+m.name(number)), m.path(m.name(number)+".sock"))
	fmt.Fprintf(&b, "cluster_key_file = %q\nbootstrap_token_file = %q\n", m.path("cluster.key"), m.path("admin.token"))
	fmt.Fprintf(&b, "bind = %q\n", m.hosts[number])
	if len(m.hosts) > 1 {
		fmt.Fprintf(&b, "bootstrap_expect = %d\nretry_join = [", len(m.hosts))
		for _, host := range m.hosts {
			fmt.Fprintf(&b, "%q, ", net.JoinHostPort(host, peerPort))
		}
		b.WriteString("]\n")
	}
	return b.Bytes()
}

func (m *meshStore) launch(number int) (*process, error) {
	return launch(m.path(m.name(number)+".log"), m.program, "server", "--config", m.path(m.name(number)+".hcl"))
}

func (m *meshStore) address(number int) string { return net.JoinHostPort(m.hosts[number], meshPort) }

// admin is a client on a server's own socket, which needs neither roots nor token.
func (m *meshStore) admin(number int) (*client.Client, error) {
	return client.New(client.Config{Address: "unix://" + m.path(m.name(number)+".sock")})
}

func (m *meshStore) target(ctx context.Context) (drive.Target, error) {
	admin, err := m.admin(0)
	if err != nil {
		return drive.Target{}, err
	}
	if m.roots, err = admin.Roots(ctx); err != nil {
		return drive.Target{}, err
	}
	t := drive.Target{System: drive.Meshd, Token: m.token, Roots: string(m.roots.PEM(trustDomain))}
	for i := range m.hosts {
		t.Addresses = append(t.Addresses, m.address(i))
	}
	return t, nil
}

// look reads the server's metrics, and then asks what only a server answers that
// knows a leader: a linearizable read.
func (m *meshStore) look(ctx context.Context, number int) (view, error) {
	admin, err := m.admin(number)
	if err != nil {
		return view{}, err
	}
	text, err := admin.Metrics(ctx)
	if err != nil {
		return view{}, err
	}
	leading, err1 := gauge(text, "mesh_server_raft_leading")
	term, err2 := gauge(text, "mesh_server_raft_term")
	_, err = admin.Status(ctx)
	return view{leads: leading == 1, term: uint64(term), led: err == nil}, errors.Join(err1, err2)
}

// gauge reads one figure without labels from the text format of Prometheus.
func gauge(text []byte, name string) (float64, error) {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			return strconv.ParseFloat(string(bytes.TrimSpace(rest)), 64)
		}
	}
	return 0, fmt.Errorf("the metrics lack %s", name)
}
