package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/tests/bench/server/drive"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// etcdStore is etcd as it comes, with TLS between its members and for clients.
type etcdStore struct {
	program string
	dir     string
	hosts   []string // one loopback address for each member
	roots   string
	http    *http.Client
}

const (
	etcdClientPort = "2379"
	etcdPeerPort   = "2380"
)

func newEtcdStore(program, dir string, hosts []string) (*etcdStore, error) {
	authority, err := rig.NewAuthority(trustDomain)
	if err != nil {
		return nil, err
	}
	e := &etcdStore{program: program, dir: dir, hosts: hosts, roots: string(authority.RootPEM())}
	template := rig.Template(spiffe.Server(trustDomain, "etcd"))
	// A member that dials another one comes from the first loopback address, and
	// etcd looks for that in its certificate.
	for _, host := range append([]string{"127.0.0.1"}, hosts...) {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(host))
	}
	cert, key, err := authority.Sign(template)
	if err != nil {
		return nil, err
	}
	pair, err := rig.PEM(cert, key)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(e.file("pair"), pair, 0o600), os.WriteFile(e.file("roots"), []byte(e.roots), 0o600)); err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	pool.AppendCertsFromPEM([]byte(e.roots))
	e.http = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}}
	return e, nil
}

func (e *etcdStore) file(name string) string { return filepath.Join(e.dir, name+".pem") }

func (e *etcdStore) launch(number int) (*process, error) {
	dir, err := folder(e.dir, "etcd", number)
	if err != nil {
		return nil, err
	}
	name := func(i int) string { return fmt.Sprintf("e%d", i+1) }
	var all []string
	for i, host := range e.hosts {
		all = append(all, fmt.Sprintf("%s=https://%s:%s", name(i), host, etcdPeerPort))
	}
	peer := fmt.Sprintf("https://%s:%s", e.hosts[number], etcdPeerPort)
	clients := fmt.Sprintf("https://%s:%s", e.hosts[number], etcdClientPort)
	return launch(filepath.Join(e.dir, name(number)+".log"), e.program,
		"--name", name(number), "--data-dir", dir,
		"--initial-cluster", strings.Join(all, ","), "--initial-cluster-state", "new", "--initial-cluster-token", "bench",
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--listen-client-urls", clients, "--advertise-client-urls", clients,
		"--cert-file", e.file("pair"), "--key-file", e.file("pair"),
		"--peer-cert-file", e.file("pair"), "--peer-key-file", e.file("pair"),
		"--peer-trusted-ca-file", e.file("roots"), "--peer-client-cert-auth")
}

func (e *etcdStore) address(number int) string {
	return net.JoinHostPort(e.hosts[number], etcdClientPort)
}

func (e *etcdStore) target(context.Context) (drive.Target, error) {
	t := drive.Target{System: drive.Etcd, Roots: e.roots}
	for i := range e.hosts {
		t.Addresses = append(t.Addresses, e.address(i))
	}
	return t, nil
}

// look asks for the health, which is a linearizable read: a member that answers
// has a leader. Who leads is not needed.
func (e *etcdStore) look(ctx context.Context, number int) (view, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+e.address(number)+"/health", nil)
	if err != nil {
		return view{}, err
	}
	resp, err := e.http.Do(req)
	if err != nil {
		return view{}, err
	}
	return view{led: resp.StatusCode == http.StatusOK}, resp.Body.Close()
}
