package detect_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/meshd/meshd/proxy/detect"
	"github.com/meshd/meshd/proxy/http1"
)

func TestOf(t *testing.T) {
	tests := map[string]struct {
		bytes string
		want  detect.Protocol
		at    int // with how many bytes it is decided
	}{
		"GET":                      {"GET / HTTP/1.1\r\n", detect.HTTP1, 5},
		"POST":                     {"POST /package.Service/Method HTTP/1.1\r\n", detect.HTTP1, 6},
		"OPTIONS *":                {"OPTIONS * HTTP/1.1\r\n", detect.HTTP1, 17},
		"absolute form":            {"GET http://api/ HTTP/1.1\r\n", detect.HTTP1, 11},
		"absolute form, TLS":       {"GET HTTPS://api/ HTTP/1.1\r\n", detect.HTTP1, 12},
		"PROPFIND":                 {"PROPFIND /dav HTTP/1.1\r\n", detect.HTTP1, 21},
		"a method of PRI's letter": {"PROP /x HTTP/1.0\r\n", detect.HTTP1, 15},
		"M-SEARCH":                 {"M-SEARCH * HTTP/1.1\r\n", detect.HTTP1, 18},
		"CONNECT":                  {"CONNECT db:5432 HTTP/1.1\r\n", detect.HTTP1, 23},
		"HTTP/2":                   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", detect.HTTP2, 12},
		"PRI of HTTP/1":            {"PRI * HTTP/1.1\r\n", detect.HTTP1, 13},
		"TLS 1.3":                  {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", detect.TLS, 6},
		"a record of TLS 1.1":      {"\x16\x03\x02\x00\x10\x01", detect.TLS, 6},
		"no ClientHello":           {"\x16\x03\x01\x00\x10\x02", detect.Opaque, 6},
		"no record of TLS":         {"\x16\x04", detect.Opaque, 2},
		"a version of none":        {"\x16\x03\x09", detect.Opaque, 3},
		"PostgreSQL":               {"\x00\x00\x00\x08\x04\xd2\x16\x2f", detect.Opaque, 1},
		"Redis":                    {"*1\r\n$4\r\nPING\r\n", detect.Opaque, 1},
		"Redis, inline":            {"PING\r\n", detect.Opaque, 5},
		"memcached":                {"get key\r\n", detect.Opaque, 1},
		"SSH":                      {"SSH-2.0-OpenSSH_9.2p1\r\n", detect.Opaque, 5},
		"RTSP":                     {"DESCRIBE rtsp://cam/1 RTSP/1.0\r\n", detect.Opaque, 10},
		"RTSP, of no URL":          {"OPTIONS * RTSP/1.0\r\n", detect.Opaque, 11},
		"SIP":                      {"REGISTER sip:example.com SIP/2.0\r\n", detect.Opaque, 10},
		"STOMP":                    {"CONNECT\naccept-version:1.2\n", detect.Opaque, 8},
		"NATS":                     {"CONNECT {\"verbose\":false}\r\n", detect.Opaque, 26},
		"SMTP, out of turn":        {"EHLO client\r\n", detect.Opaque, 6},
		"IMAP":                     {"A1 LOGIN\r\n", detect.Opaque, 2},
		"PROXY":                    {"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", detect.Opaque, 7},
		"a word too long":          {strings.Repeat("A", 40), detect.Opaque, 25},
		"a line too long":          {"LIST /" + strings.Repeat("a", detect.Most), detect.Opaque, detect.Most - 20},
		"no word":                  {" GET /", detect.Opaque, 1},
		"empty line first":         {"\r\nGET / HTTP/1.1\r\n", detect.Opaque, 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			at := 0
			for at < len(tt.bytes) && detect.Of([]byte(tt.bytes[:at])) == detect.Undecided {
				at++
			}
			if got := detect.Of([]byte(tt.bytes[:at])); got != tt.want {
				t.Fatalf("it is %s with %d bytes, want %s", got, at, tt.want)
			}
			if at != tt.at {
				t.Errorf("it was decided with %d bytes, want %d: %q", at, tt.at, tt.bytes[:at])
			}
		})
	}
}

// clientHello returns what crypto/tls sends first.
func clientHello(t *testing.T, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer func() { _ = server.Close() }()
	done := make(chan error, 1)
	go func() {
		done <- tls.Client(client, &tls.Config{ServerName: name, InsecureSkipVerify: name == "", MinVersion: tls.VersionTLS12}).Handshake()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(server, head); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(server, rest); err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	if err := <-done; err == nil {
		t.Error("the handshake ended well without a server")
	}
	_ = client.Close()
	return append(head, rest...)
}

func TestServerName(t *testing.T) {
	named, nameless := clientHello(t, "db.example.com"), clientHello(t, "")
	if got, ok := detect.ServerName(named); !ok || string(got) != "db.example.com" {
		t.Errorf("the name is %q, %v", got, ok)
	}
	if got, ok := detect.ServerName(nameless); ok {
		t.Errorf("a client that asks for no name asks for %q", got)
	}
	found := -1
	for i := range named {
		got, ok := detect.ServerName(named[:i])
		if ok && string(got) != "db.example.com" {
			t.Fatalf("with %d bytes the name is %q", i, got)
		}
		if ok && found < 0 {
			found = i
		}
		if !ok && found >= 0 {
			t.Fatalf("with %d bytes the name is gone again", i)
		}
	}
	if found < 0 || found >= len(named) {
		t.Errorf("the name was found with %d of %d bytes", found, len(named))
	}
	if got, ok := detect.ServerName([]byte("GET / HTTP/1.1\r\n")); ok {
		t.Errorf("HTTP asks for %q", got)
	}
}

// FuzzOf holds it to what it promises: a decision in time, for good, and the one of the codec for what that takes.
func FuzzOf(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "REPORT http://a/ HTTP/1.0\r\nHost: a\r\n\r\n", "CONNECT {}\r\n", "\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		decided := detect.Undecided
		for i := range len(b) + 1 {
			got := detect.Of(b[:i])
			switch {
			case decided == detect.Undecided:
				decided = got
			case got != decided:
				t.Fatalf("it was %s before, and is %s with %d bytes of %q", decided, got, i, b)
			}
			if got == detect.Undecided && i >= detect.Most {
				t.Fatalf("%d bytes, and no decision", i)
			}
		}
		if name, ok := detect.ServerName(b); ok && (len(name) == 0 || !bytes.Contains(b, name)) {
			t.Fatalf("the name %q is not in %q", name, b)
		}
		var r http1.Request
		var limits http1.Limits
		limits = limits.WithDefaults()
		_, err := r.Parse(b, &limits)
		if err != nil && !errors.Is(err, http1.ErrShort) || len(r.Method) == 0 || len(r.Method) > 24 || len(b) > detect.Most {
			return
		}
		for _, c := range r.Method {
			if (c < 'A' || c > 'Z') && c != '-' && c != '_' || r.Method[0] < 'A' || r.Method[0] > 'Z' {
				return
			}
		}
		if decided != detect.HTTP1 {
			t.Fatalf("HTTP/1 takes %q, which is %s", b, decided)
		}
	})
}

// BenchmarkOf is what a connection's first look costs.
func BenchmarkOf(b *testing.B) {
	head := []byte("POST /package.Service/Method HTTP/1.1\r\nHost: api\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		if detect.Of(head) != detect.HTTP1 {
			b.Fatal("not HTTP/1")
		}
	}
}
