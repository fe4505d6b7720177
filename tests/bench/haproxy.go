package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const (
	haproxyName = "HAProxy"
	// cipherSuite is what Go and BoringSSL take between two machines with AES
	// instructions; HAProxy is held to it.
	cipherSuite = "TLS_AES_128_GCM_SHA256"

	http1ALPN = "http/1.1"
	http2ALPN = "h2"
)

// haproxyDefaults are the same times and the same choice of endpoint as the
// mesh has. Threads are HAProxy's default: one per CPU that it may use.
const haproxyDefaults = `global
  maxconn 8000
defaults
  mode http
  timeout connect 1s
  timeout client 5m
  timeout server 5m
  timeout http-request 10s
  timeout http-keep-alive 5m
  http-reuse always
  balance random(2)
  default-server pool-purge-delay 1m
frontend metrics
  bind fd@3
  http-request use-service prometheus-exporter if { path /metrics }
`

// haproxy starts one, whose socket 3 is for metrics and 4 and up are for the
// configuration.
func (f *field) haproxy(name, role, text string, sockets []*os.File) (part, error) {
	addresses, files, err := f.listen(1)
	if err != nil {
		return part{}, err
	}
	text = haproxyDefaults + text
	f.note(haproxyName+", "+name, text)
	pid, err := f.started(rig.StartHAProxy(f.path("haproxy-"+name), text, append(files, sockets...), func(string) {}))
	return part{role: role, pids: []int{pid}, metrics: "http://" + addresses[0] + "/metrics"}, err
}

// haproxyFrontend takes requests for one backend.
func haproxyFrontend(name, binds string, lines ...string) string {
	return fmt.Sprintf("frontend in-%[1]s\n%[2]s  %[3]s\n  default_backend %[1]s\n", name, binds, strings.Join(lines, "\n  "))
}

// haproxyBackend has five servers.
func haproxyBackend(name, options string, servers []string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "backend %s\n", name)
	for i, address := range servers {
		fmt.Fprintf(&out, "  server s%d %s%s\n", i, address, options)
	}
	return out.String()
}

// haproxyAccess are the access rules of the callee for HTTP. allowed is what
// tells a caller that is on the list.
func haproxyAccess(allowed, identity string) []string {
	return []string{
		"http-request deny if { path_beg /admin/ }",
		"http-request deny unless { method GET HEAD POST } " + allowed,
		"http-request set-header x-forwarded-client-cert " + identity,
	}
}

func repeat(address string) []string {
	out := make([]string, endpoints)
	for i := range out {
		out[i] = address
	}
	return out
}

// haproxyHop is one plain hop.
func (f *field) haproxyHop() error {
	list := f.path("hosts")
	if err := os.WriteFile(list, []byte(strings.Join(hosts(), "\n")+"\n"), 0o600); err != nil {
		return err
	}
	addresses, files, err := f.listen(clusters)
	if err != nil {
		return err
	}
	var text strings.Builder
	for c := range clusters {
		proto, to := "", f.backend
		if c == http2Cluster {
			proto, to = " proto h2", f.backend2
		}
		text.WriteString(haproxyFrontend(clusterName(c), fmt.Sprintf("  bind fd@%d%s\n", 4+c, proto),
			haproxyAccess("{ src -f "+list+" }", `"`+l7.ForwardedClientCert(api(), web())+`"`)...))
		text.WriteString(haproxyBackend(clusterName(c), proto, repeat(to)))
	}
	p, err := f.haproxy("hop", "proxy", text.String(), files)
	f.lanes = append(f.lanes, lane{scenario: plain, name: haproxyName, address: addresses[httpCluster], parts: []part{p}},
		lane{scenario: plain2, name: haproxyName, address: addresses[http2Cluster], parts: []part{p}})
	return err
}

// haproxyPair is two with mutual TLS between them.
func (f *field) haproxyPair() error {
	list := f.path("callers")
	var ids strings.Builder
	for _, id := range callers() {
		fmt.Fprintln(&ids, id)
	}
	if err := os.WriteFile(list, []byte(ids.String()), 0o600); err != nil {
		return err
	}
	tls := func(name, alpn string) string {
		return fmt.Sprintf("ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3 ciphersuites %s alpn %s",
			f.path(name+".pem"), f.path("ca.pem"), cipherSuite, alpn)
	}
	meshes, meshFiles, err := f.listen(3 * endpoints)
	if err != nil {
		return err
	}
	binds := func(first int, alpn string) string {
		var out strings.Builder
		for i := range endpoints {
			fmt.Fprintf(&out, "  bind fd@%d %s\n", 4+first+i, tls("far", alpn))
		}
		return out.String()
	}
	allowed := "{ ssl_c_s_dn(CN) -m str -f " + list + " }"
	access := haproxyAccess(allowed, `"By=`+api().String()+`;URI=%[ssl_c_s_dn(CN)]"`)
	far, err := f.haproxy("far", "far", haproxyFrontend("api", binds(0, http1ALPN), access...)+
		haproxyBackend("api", "", []string{f.backend})+
		haproxyFrontend("api2", binds(2*endpoints, http2ALPN), access...)+
		haproxyBackend("api2", " proto h2", []string{f.backend2})+
		haproxyFrontend("stream", binds(endpoints, http1ALPN), "mode tcp", "tcp-request content reject unless "+allowed)+
		haproxyBackend("stream\n  mode tcp", "", []string{f.stream}), meshFiles)
	if err != nil {
		return err
	}
	far.mesh = meshes[0]
	addresses, files, err := f.listen(clusters)
	if err != nil {
		return err
	}
	var text strings.Builder
	for c := range clusters {
		mode, to := "mode http\n  http-request del-header x-forwarded-client-cert", meshes[:endpoints]
		proto, alpn := "", http1ALPN
		switch c {
		case streamCluster:
			mode, to = "mode tcp", meshes[endpoints:2*endpoints]
		case http2Cluster:
			proto, alpn, to = " proto h2", http2ALPN, meshes[2*endpoints:]
		}
		text.WriteString(haproxyFrontend(clusterName(c), fmt.Sprintf("  bind fd@%d%s\n", 4+c, proto), mode))
		short, _, _ := strings.Cut(mode, "\n")
		text.WriteString(haproxyBackend(clusterName(c)+"\n  "+short, fmt.Sprintf(" %s sni str(%s) verifyhost %[2]s", tls("near", alpn), peerName), to))
	}
	near, err := f.haproxy("near", "near", text.String(), files)
	parts := []part{near, far}
	f.lanes = append(f.lanes, lane{scenario: mutual, name: haproxyName, address: addresses[httpCluster], parts: parts}, lane{scenario: stream, name: haproxyName, address: addresses[streamCluster], parts: parts},
		lane{scenario: mutual2, name: haproxyName, address: addresses[http2Cluster], parts: parts})
	return err
}
