package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const (
	plain  = "one plain hop"
	mutual = "two hops with mutual TLS between them"

	trustDomain = "bench.mesh"
	// peerName is the DNS name in the certificates of nginx and HAProxy.
	peerName = "app.mesh"
)

// contender is one proxy, or pair of them, between the client and the backend.
type contender struct {
	scenario, name, address string
	processes               []process
}

// process is one whose cost counts.
type process struct {
	role string
	pid  int
}

// costs returns the cost of each process so far.
func (c contender) costs() ([]rig.Cost, error) {
	out := make([]rig.Cost, len(c.processes))
	for i, p := range c.processes {
		var err error
		if out[i], err = rig.CostOf(p.pid); err != nil {
			return nil, fmt.Errorf("cost of %s, %s: %w", c.name, p.role, err)
		}
	}
	return out, nil
}

// field is the backend and all contenders, running side by side. Those that
// are not measured are idle.
type field struct {
	dir, proxy string
	backend    string
	contenders []contender
	configs    []config // in the order in which they were written

	closers []func() error
}

// config is a configuration as it was used, for the report.
type config struct{ name, text string }

// start starts everything.
func (f *field) start(ctx context.Context) error {
	authority, err := rig.NewAuthority(trustDomain)
	if err != nil {
		return err
	}
	if err := f.certificates(authority); err != nil {
		return err
	}
	if f.backend, _, err = f.nginx("backend", 1, backendConfig); err != nil {
		return err
	}
	for _, start := range []func() error{
		f.plainHop, f.plainHAProxy, f.plainNginx,
		func() error { return f.meshPair(ctx, authority) },
		f.mutualHAProxy, f.mutualNginx,
	} {
		if err := start(); err != nil {
			return err
		}
	}
	return nil
}

// close ends everything, the last started first.
func (f *field) close() error {
	var errs []error
	for _, closer := range slices.Backward(f.closers) {
		errs = append(errs, closer())
	}
	return errors.Join(errs...)
}

func (f *field) path(name string) string { return filepath.Join(f.dir, name) }

// certificates writes what nginx and HAProxy prove themselves with: like the
// mesh's own, on P-256, but with a DNS name, which is what they can check.
func (f *field) certificates(a *rig.Authority) error {
	if err := os.WriteFile(f.path("ca.pem"), a.RootPEM(), 0o600); err != nil {
		return err
	}
	for _, name := range []string{"near", "far"} {
		template := rig.Template(spiffe.Service(trustDomain, catalog.DefaultNamespace, name))
		template.DNSNames = []string{peerName}
		cert, key, err := a.Sign(template)
		if err != nil {
			return err
		}
		data, err := rig.PEM(cert, key)
		if err != nil {
			return err
		}
		if err := os.WriteFile(f.path(name+".pem"), data, 0o600); err != nil {
			return err
		}
		if _, err := cert.Verify(x509.VerifyOptions{
			DNSName: peerName, Roots: pool(a), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		}); err != nil {
			return fmt.Errorf("certificate of %s: %w", name, err)
		}
	}
	return nil
}

func pool(a *rig.Authority) *x509.CertPool {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.RootPEM())
	return roots
}

// listen opens a socket for a child.
func (f *field) listen() (string, *os.File, error) {
	address, file, err := rig.Listen()
	if err == nil {
		f.closers = append(f.closers, file.Close)
	}
	return address, file, err
}

// add counts a process and makes sure that it ends.
func (f *field) started(p *rig.Process, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	f.closers = append(f.closers, p.Stop)
	return p.PID(), nil
}

// note keeps a configuration for the report, without this run's paths.
func (f *field) note(name, text string) {
	f.configs = append(f.configs, config{name, strings.TrimSpace(strings.ReplaceAll(text, f.dir, "DIR"))})
}

// nginx starts one with what text makes of its own address.
func (f *field) nginx(name string, workers int, text func(address string) string) (string, int, error) {
	address, file, err := f.listen()
	if err != nil {
		return "", 0, err
	}
	main := fmt.Sprintf("worker_processes %d;\nworker_rlimit_nofile 8192;\nevents { worker_connections 4096; }", workers)
	f.note("nginx, "+name, main+"\nhttp {\n"+text(address)+"}")
	pid, err := f.started(rig.StartNginx(f.path(name), main, text(address), []*os.File{file}, func(string) {}))
	return address, pid, err
}

// haproxy starts one.
func (f *field) haproxy(name, text string) (string, int, error) {
	address, file, err := f.listen()
	if err != nil {
		return "", 0, err
	}
	f.note("HAProxy, "+name, text)
	pid, err := f.started(rig.StartHAProxy(f.path(name), text, []*os.File{file}, func(string) {}))
	return address, pid, err
}

func (f *field) plainHop() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	address, file, err := f.listen()
	if err != nil {
		return err
	}
	pid, err := f.started(rig.Start(self, []string{hopCommand, f.backend}, rig.Options{Files: []*os.File{file}}))
	f.contenders = append(f.contenders, contender{plain, "proxy/l7 alone", address, []process{{"proxy", pid}}})
	return err
}

func (f *field) plainHAProxy() error {
	address, pid, err := f.haproxy("plain", haproxyConfig("bind fd@3", "server backend "+f.backend))
	f.contenders = append(f.contenders, contender{plain, "HAProxy", address, []process{{"proxy", pid}}})
	return err
}

func (f *field) plainNginx() error {
	address, pid, err := f.nginx("plain", threads, func(address string) string {
		return nginxConfig(address, f.backend, "http", "")
	})
	f.contenders = append(f.contenders, contender{plain, "nginx", address, []process{{"proxy", pid}}})
	return err
}

// meshPair is the product: two mesh-proxy processes with identities, policy
// and metrics, as an agent would run them.
func (f *field) meshPair(ctx context.Context, a *rig.Authority) error {
	dir := f.path("m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	pair, err := rig.NewPair(ctx, rig.Config{
		Proxy: f.proxy, Dir: dir, Authority: a, Source: spiffe.Service(trustDomain, catalog.DefaultNamespace, "web"),
		Apps: []rig.App{{Name: "api", Address: f.backend, Intentions: []intentions.Intention{{
			Source: "web", Destination: "api", Rules: []intentions.Rule{
				{Action: intentions.Deny, PathPrefix: "/admin/"},
				{Action: intentions.Allow, Methods: []string{"GET", "HEAD"}, PathPrefix: "/"},
			},
		}}}},
	})
	if err != nil {
		return err
	}
	f.closers = append(f.closers, pair.Close)
	f.contenders = append(f.contenders, contender{mutual, "mesh-proxy", pair.Upstreams["api"], []process{
		{"near", pair.Caller.PID()}, {"far", pair.Callee.PID()},
	}})
	return nil
}

func (f *field) mutualHAProxy() error {
	tls := fmt.Sprintf("crt %%s ca-file %s verify required ssl-min-ver TLSv1.3 ciphersuites %s alpn http/1.1", f.path("ca.pem"), cipherSuite)
	far, farPID, err := f.haproxy("far", haproxyConfig("bind fd@3 ssl "+fmt.Sprintf(tls, f.path("far.pem")), "server backend "+f.backend))
	if err != nil {
		return err
	}
	near, nearPID, err := f.haproxy("near", haproxyConfig("bind fd@3", fmt.Sprintf(
		"server far %s ssl sni str(%s) verifyhost %s %s", far, peerName, peerName, fmt.Sprintf(tls, f.path("near.pem")))))
	f.contenders = append(f.contenders, contender{mutual, "HAProxy", near, []process{{"near", nearPID}, {"far", farPID}}})
	return err
}

func (f *field) mutualNginx() error {
	far, farPID, err := f.nginx("far-nginx", threads, func(address string) string {
		return nginxConfig(address+" ssl", f.backend, "http", nginxTLS("ssl", "ssl_client_certificate", f.dir, "far")+
			"    ssl_verify_client on;\n")
	})
	if err != nil {
		return err
	}
	near, nearPID, err := f.nginx("near-nginx", threads, func(address string) string {
		return nginxConfig(address, far, "https", nginxTLS("proxy_ssl", "proxy_ssl_trusted_certificate", f.dir, "near")+
			"    proxy_ssl_verify on;\n    proxy_ssl_server_name on;\n    proxy_ssl_name "+peerName+";\n")
	})
	f.contenders = append(f.contenders, contender{mutual, "nginx", near, []process{{"near", nearPID}, {"far", farPID}}})
	return err
}
