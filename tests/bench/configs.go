package main

import (
	"fmt"
	"runtime"
	"strings"
)

// cipherSuite is what Go's TLS 1.3 takes between two machines with AES
// instructions; the others are held to it.
const cipherSuite = "TLS_AES_128_GCM_SHA256"

// threads is how many each proxy may use: all of them, as by default.
var threads = runtime.NumCPU() //nolint:gochecknoglobals // a constant of the machine

// backendConfig answers from memory.
func backendConfig(address string) string {
	return fmt.Sprintf(`  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  server {
    listen %s;
    set $kib "%s";
    location /100 { return 200 "%s"; }
    location /10k { return 200 "%s"; }
  }
`, address, strings.Repeat("k", 1024), strings.Repeat("b", 100), strings.Repeat("$kib", 10))
}

// nginxConfig is a reverse proxy with keep-alive on both sides. nginx keeps
// its connections per worker.
func nginxConfig(listen, to, scheme, more string) string {
	return fmt.Sprintf(`  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  upstream next {
    server %s;
    keepalive 128;
    keepalive_requests 1000000000;
  }
  server {
    listen %s;
%s    location / {
      proxy_pass %s://next;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
    }
  }
`, to, listen, more, scheme)
}

// nginxTLS is one side of mutual TLS; trust is the directive that names the
// roots.
func nginxTLS(prefix, trust, dir, name string) string {
	return fmt.Sprintf(`    %[1]s_certificate %[3]s/%[4]s.pem;
    %[1]s_certificate_key %[3]s/%[4]s.pem;
    %[2]s %[3]s/ca.pem;
    %[1]s_protocols TLSv1.3;
    %[1]s_conf_command Ciphersuites %[5]s;
`, prefix, trust, dir, name, cipherSuite)
}

// haproxyConfig is a reverse proxy that keeps and shares its connections to
// the next.
func haproxyConfig(bind, server string) string {
	return fmt.Sprintf(`global
  nbthread %d
  maxconn 4096
  tune.ssl.default-dh-param 2048
defaults
  mode http
  timeout connect 1s
  timeout client 1h
  timeout server 1h
  timeout http-keep-alive 1h
  http-reuse always
frontend in
  %s
  default_backend out
backend out
  %s
`, threads, bind, server)
}
