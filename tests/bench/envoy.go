package main

import (
	"encoding/json"
	"maps"
	"net/netip"
	"os"
	"strconv"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const envoyName = "Envoy"

// A node is a part of Envoy's configuration, which is written as JSON.
type node = map[string]any

const (
	envoyHTTP = "type.googleapis.com/envoy.extensions.filters.http."
	envoyNet  = "type.googleapis.com/envoy.extensions.filters.network."
	envoyTLS  = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
	envoyKind = "@type"
)

// envoy starts one with an admin port for its metrics.
func (f *field) envoy(name, role string, listeners, clusters []node) (part, error) {
	admin, err := freePort() // Envoy takes this one for itself alone
	if err != nil {
		return part{}, err
	}
	text, err := json.MarshalIndent(node{
		"admin":            node{"address": envoyAddress(admin)},
		"static_resources": node{"listeners": listeners, "clusters": clusters},
	}, "", " ")
	if err != nil {
		return part{}, err
	}
	file := f.path("envoy-" + name + ".json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return part{}, err
	}
	f.note(envoyName+", "+name, string(text))
	cpus, _ := f.setting.cpus()
	pid, err := f.started(rig.Start(f.options.envoy, []string{
		"-c", file, "--concurrency", strconv.Itoa(len(cpus)), "--disable-hot-restart", "-l", "error",
	}, rig.Options{}))
	return part{role: role, pids: []int{pid}, metrics: "http://" + admin + "/stats/prometheus"}, err
}

func envoyAddress(address string) node {
	ap := netip.MustParseAddrPort(address)
	return node{"socket_address": node{"address": ap.Addr().String(), "port_value": ap.Port()}}
}

// envoyListener listens on one or more addresses.
func envoyListener(name string, addresses []string, chain node) node {
	out := node{"name": name, "address": envoyAddress(addresses[0]), "filter_chains": []node{chain}}
	more := []node{}
	for _, a := range addresses[1:] {
		more = append(more, node{"address": envoyAddress(a)})
	}
	if len(more) > 0 {
		out["additional_addresses"] = more
	}
	return out
}

func envoyFilter(name, kind string, config node) node {
	config[envoyKind] = kind
	return node{"name": name, "typed_config": config}
}

// envoyManager handles HTTP/1.1 as little as the others do: no request id, no
// headers of its own, no time limit for a whole request.
func envoyManager(cluster string, more node, filters ...node) node {
	filters = append(filters, envoyFilter("envoy.filters.http.router", envoyHTTP+"router.v3.Router", node{"suppress_envoy_headers": true}))
	config := node{
		"stat_prefix": cluster, "codec_type": "HTTP1", "generate_request_id": false,
		"server_header_transformation": "PASS_THROUGH", "http_filters": filters,
		"route_config": node{"virtual_hosts": []node{{
			"name": "all", "domains": []string{"*"},
			"routes": []node{{"match": node{"prefix": "/"}, "route": node{"cluster": cluster, "timeout": "0s"}}},
		}}},
	}
	maps.Copy(config, more)
	return envoyFilter("http", envoyNet+"http_connection_manager.v3.HttpConnectionManager", config)
}

// envoyWindows are the mesh's own, and what Envoy's makers advise for an edge:
// by default it takes up to 256 MiB of one stream.
func envoyWindows() node {
	return node{"initial_stream_window_size": 64 << 10, "initial_connection_window_size": 1 << 20}
}

// envoyHTTP2 makes a cluster's connections HTTP/2.
func envoyHTTP2(cluster node) node {
	const options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	cluster["typed_extension_protocol_options"] = node{options: node{
		envoyKind: "type.googleapis.com/" + options, "explicit_http_config": node{"http2_protocol_options": envoyWindows()},
	}}
	return cluster
}

// envoyCodec2 makes a manager take HTTP/2 only.
func envoyCodec2() node {
	return node{"codec_type": "HTTP2", "http2_protocol_options": envoyWindows()}
}

func envoyTCP(cluster string) node {
	return envoyFilter("tcp", envoyNet+"tcp_proxy.v3.TcpProxy", node{"stat_prefix": cluster, "cluster": cluster, "idle_timeout": "300s"})
}

func envoyRBAC(kind string, permission node, principals []node, more node) node {
	config := node{"rules": node{"action": "ALLOW", "policies": node{"callers": node{
		"permissions": []node{permission}, "principals": principals,
	}}}}
	maps.Copy(config, more)
	return envoyFilter("rbac", kind, config)
}

// envoyAccess are the callee's access rules for HTTP.
func envoyAccess(principals []node) node {
	method := func(name string) node {
		return node{"header": node{"name": ":method", "string_match": node{"exact": name}}}
	}
	return envoyRBAC(envoyHTTP+"rbac.v3.RBAC", node{"and_rules": node{"rules": []node{
		{"not_rule": node{"url_path": node{"path": node{"prefix": "/admin/"}}}},
		{"or_rules": node{"rules": []node{method("GET"), method("HEAD"), method("POST")}}},
	}}}, principals, nil)
}

// envoyCallers are the identities that may call.
func envoyCallers() []node {
	out := []node{}
	for _, id := range callers() {
		out = append(out, node{"authenticated": node{"principal_name": node{"exact": id.String()}}})
	}
	return out
}

// envoyCluster chooses the less loaded of two, as the mesh does.
func envoyCluster(name string, addresses []string, socket node) node {
	hosts := []node{}
	for _, a := range addresses {
		hosts = append(hosts, node{"endpoint": node{"address": envoyAddress(a)}})
	}
	out := node{
		"name": name, "type": "STATIC", "connect_timeout": "1s", "lb_policy": "LEAST_REQUEST",
		"load_assignment": node{"cluster_name": name, "endpoints": []node{{"lb_endpoints": hosts}}},
	}
	if socket != nil {
		out["transport_socket"] = socket
	}
	return out
}

// envoyTransport is one side of mutual TLS.
func (f *field) envoyTransport(kind, name, alpn string, peer spiffe.ID, more node) node {
	file := func(name string) node { return node{"filename": f.path(name)} }
	trust := node{"trusted_ca": file("ca.pem")}
	if !peer.IsZero() {
		trust["match_typed_subject_alt_names"] = []node{{"san_type": "URI", "matcher": node{"exact": peer.String()}}}
	}
	config := node{"common_tls_context": node{
		"alpn_protocols":     []string{alpn},
		"tls_params":         node{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
		"tls_certificates":   []node{{"certificate_chain": file(name + ".pem"), "private_key": file(name + ".pem")}},
		"validation_context": trust,
	}}
	maps.Copy(config, more)
	return envoyFilter("envoy.transport_sockets.tls", envoyTLS+kind, config)
}

// envoyHop is one plain hop.
func (f *field) envoyHop() error {
	addresses, err := f.reserve(clusters)
	if err != nil {
		return err
	}
	principals := []node{}
	for _, host := range hosts() {
		principals = append(principals, node{"direct_remote_ip": node{"address_prefix": host, "prefix_len": 32}})
	}
	headers := node{"request_headers_to_add": []node{{
		"header":        node{"key": "x-forwarded-client-cert", "value": l7.ForwardedClientCert(api(), web())},
		"append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
	}}}
	listeners, out := []node{}, []node{}
	for c := range clusters {
		var more node
		cluster := envoyCluster(clusterName(c), repeat(f.backend), nil)
		if c == http2Cluster {
			more, cluster = envoyCodec2(), envoyHTTP2(envoyCluster(clusterName(c), repeat(f.backend2), nil))
		}
		manager := envoyManager(clusterName(c), more, envoyAccess(principals))
		if config, ok := manager["typed_config"].(node); ok {
			if routes, ok := config["route_config"].(node); ok {
				routes["request_headers_to_add"] = headers["request_headers_to_add"]
			}
		}
		listeners = append(listeners, envoyListener(clusterName(c), addresses[c:c+1], node{"filters": []node{manager}}))
		out = append(out, cluster)
	}
	p, err := f.envoy("hop", "proxy", listeners, out)
	f.lanes = append(f.lanes, lane{scenario: plain, name: envoyName, address: addresses[httpCluster], parts: []part{p}},
		lane{scenario: plain2, name: envoyName, address: addresses[http2Cluster], parts: []part{p}})
	return err
}

// envoyPair is two with mutual TLS between them.
func (f *field) envoyPair() error {
	meshes, err := f.reserve(3 * endpoints)
	if err != nil {
		return err
	}
	server := func(alpn string) node {
		return f.envoyTransport("DownstreamTlsContext", "far", alpn, spiffe.ID{}, node{"require_client_certificate": true})
	}
	sanitize := node{"forward_client_cert_details": "SANITIZE_SET", "set_current_client_cert_details": node{"uri": true}}
	sanitize2 := envoyCodec2()
	maps.Copy(sanitize2, sanitize)
	manager := envoyManager("api", sanitize, envoyAccess(envoyCallers()))
	manager2 := envoyManager("api2", sanitize2, envoyAccess(envoyCallers()))
	gate := envoyRBAC(envoyNet+"rbac.v3.RBAC", node{"any": true}, envoyCallers(), node{"stat_prefix": "stream"})
	far, err := f.envoy("far", "far", []node{
		envoyListener("api", meshes[:endpoints], node{"filters": []node{manager}, "transport_socket": server(http1ALPN)}),
		envoyListener("stream", meshes[endpoints:2*endpoints], node{"filters": []node{gate, envoyTCP("stream")}, "transport_socket": server(http1ALPN)}),
		envoyListener("api2", meshes[2*endpoints:], node{"filters": []node{manager2}, "transport_socket": server(http2ALPN)}),
	}, []node{
		envoyCluster("api", []string{f.backend}, nil), envoyCluster("stream", []string{f.stream}, nil),
		envoyHTTP2(envoyCluster("api2", []string{f.backend2}, nil)),
	})
	if err != nil {
		return err
	}
	far.mesh = meshes[0]
	addresses, err := f.reserve(clusters)
	if err != nil {
		return err
	}
	client := func(alpn string) node {
		return f.envoyTransport("UpstreamTlsContext", "near", alpn, api(), node{"sni": peerName})
	}
	listeners, out := []node{}, []node{}
	for c := range clusters {
		filter, cluster := node(nil), node(nil)
		switch c {
		case streamCluster:
			filter, cluster = envoyTCP(clusterName(c)), envoyCluster(clusterName(c), meshes[endpoints:2*endpoints], client(http1ALPN))
		case http2Cluster:
			filter, cluster = envoyManager(clusterName(c), envoyCodec2()), envoyHTTP2(envoyCluster(clusterName(c), meshes[2*endpoints:], client(http2ALPN)))
		default:
			filter, cluster = envoyManager(clusterName(c), nil), envoyCluster(clusterName(c), meshes[:endpoints], client(http1ALPN))
		}
		listeners = append(listeners, envoyListener(clusterName(c), addresses[c:c+1], node{"filters": []node{filter}}))
		out = append(out, cluster)
	}
	near, err := f.envoy("near", "near", listeners, out)
	parts := []part{near, far}
	f.lanes = append(f.lanes, lane{scenario: mutual, name: envoyName, address: addresses[httpCluster], parts: parts},
		lane{scenario: stream, name: envoyName, address: addresses[streamCluster], parts: parts},
		lane{scenario: mutual2, name: envoyName, address: addresses[http2Cluster], parts: parts})
	return err
}
