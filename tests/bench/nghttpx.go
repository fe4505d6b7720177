package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const (
	nghttpxName = "nghttpx"
	// goName is a proxy of net/http and its ReverseProxy, of a few lines.
	goName = "net/http"
)

// nghttpx starts one that forwards HTTP/2 to some addresses; front and back are
// options of its listener and of its connections to these. It has no access rules
// and no metrics, and knows no cluster but the one.
func (f *field) nghttpx(ctx context.Context, name, role, front, back string, to []string, args ...string) (address string, p part, err error) {
	if address, err = freePort(); err != nil {
		return "", part{}, err
	}
	cpus, _ := f.setting.cpus()
	path, err := rig.Find("nghttpx")
	if err != nil {
		return "", part{}, err
	}
	args = append([]string{
		"--conf=/dev/null", "--workers=" + strconv.Itoa(len(cpus)), "--no-via", "--no-server-rewrite", "--no-location-rewrite",
		"--no-ocsp", "--add-request-header=x-forwarded-client-cert: " + l7.ForwardedClientCert(api(), web()),
		"--frontend-http2-read-timeout=5m", "--backend-read-timeout=5m", "--backend-keep-alive-timeout=5m",
		"--frontend=" + strings.Replace(address, ":", ",", 1) + front,
	}, args...)
	for _, target := range to {
		args = append(args, "--backend="+strings.Replace(target, ":", ",", 1)+";;proto=h2"+back)
	}
	f.note(nghttpxName+", "+name, strings.Join(args, "\n"))
	pid, err := f.started(rig.Start(path, args, rig.Options{}))
	if err != nil {
		return "", part{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var d net.Dialer
	err = f.retry(ctx, func() error { // then the worker process is there
		nc, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return nc.Close()
	})
	if err != nil {
		return "", part{}, err
	}
	pids, err := rig.Family(pid)
	return address, part{role: role, pids: pids}, err
}

// nghttpxHop is one plain hop.
func (f *field) nghttpxHop(ctx context.Context) error {
	address, p, err := f.nghttpx(ctx, "hop", "proxy", ";no-tls", "", repeat(f.backend2))
	f.lanes = append(f.lanes, lane{scenario: plain2, name: nghttpxName, address: address, parts: []part{p}, bare: true})
	return err
}

// nghttpxPair is two with mutual TLS between them. The far one serves all five
// endpoints at one address.
func (f *field) nghttpxPair(ctx context.Context) error {
	mesh, far, err := f.nghttpx(ctx, "far", "far", "", "", []string{f.backend2},
		"--tls-min-proto-version=TLSv1.3", "--tls13-ciphers="+cipherSuite, "--verify-client", "--verify-client-cacert="+f.path("ca.pem"),
		f.path("far.pem"), f.path("far.pem"))
	if err != nil {
		return err
	}
	address, near, err := f.nghttpx(ctx, "near", "near", ";no-tls", ";tls;sni="+peerName, repeat(mesh),
		"--tls-min-proto-version=TLSv1.3", "--tls13-client-ciphers="+cipherSuite, "--cacert="+f.path("ca.pem"),
		"--client-cert-file="+f.path("near.pem"), "--client-private-key-file="+f.path("near.pem"))
	f.lanes = append(f.lanes, lane{scenario: mutual2, name: nghttpxName, address: address, parts: []part{near, far}, bare: true})
	return err
}

// goHop starts this program as a proxy of net/http.
func (f *field) goHop() error {
	addresses, files, err := f.listen(1)
	if err != nil {
		return err
	}
	pid, err := f.started(rig.Start(f.options.self, []string{goHopCommand, f.backend2}, rig.Options{Files: files}))
	f.lanes = append(f.lanes, lane{scenario: plain2, name: goName, address: addresses[0], parts: []part{{role: "proxy", pids: []int{pid}}}, bare: true})
	return err
}

// serveGoHop serves socket 3 until it is killed.
func serveGoHop(backend string) error {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return fmt.Errorf("take the listening socket: %w", err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	target := &url.URL{Scheme: "http", Host: backend}
	proxy := &httputil.ReverseProxy{
		FlushInterval: -1, // at once, as gRPC needs it
		Transport:     &http.Transport{Protocols: protocols, DisableCompression: true},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Set("X-Forwarded-Client-Cert", l7.ForwardedClientCert(api(), web()))
		},
	}
	srv := &http.Server{Handler: proxy, Protocols: protocols, ReadHeaderTimeout: startTimeout}
	return srv.Serve(l)
}
