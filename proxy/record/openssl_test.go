package record_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

// TestOpenSSL has another implementation at the far side, with each suite, and key updates that ask for ours.
func TestOpenSSL(t *testing.T) {
	serverConfig, _ := configs(t)
	cert, key := pemFiles(t, serverConfig.Certificates[0])
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"} {
		t.Run(suite, func(t *testing.T) {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			client := exec.CommandContext(t.Context(), "openssl", "s_client", "-connect", l.Addr().String(), "-ciphersuites", suite,
				"-cert", cert, "-key", key, "-CAfile", cert, "-alpn", "x")
			in, err := client.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := client.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			client.Stderr = client.Stdout // it tells of updates there
			if err := client.Start(); err != nil {
				t.Fatalf("start openssl, which make setup installs: %v", err)
			}
			defer func() { _ = client.Wait() }() // it was told to end, or is killed with the test's context
			nc, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			tc, ok := nc.(*net.TCPConn)
			if !ok {
				t.Fatal("not TCP")
			}
			conn, state, err := record.Server(t.Context(), sock.New(tc), serverConfig)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			stop := time.AfterFunc(20*time.Second, func() { _ = client.Process.Kill() }) // ends the wait for its output
			defer stop.Stop()
			if got := tls.CipherSuiteName(state.CipherSuite); got != suite {
				t.Fatalf("the suite is %s", got)
			}
			theirs, ours := bufio.NewScanner(out), bufio.NewScanner(conn)
			for round := range 3 {
				// K on a line of its own makes it update its key, and ask for ours.
				if _, err := fmt.Fprintf(in, "ping %d\n", round); err != nil {
					t.Fatal(err)
				}
				if want := fmt.Sprintf("ping %d", round); !ours.Scan() || ours.Text() != want {
					t.Fatalf("read %q, %v; want %q", ours.Text(), ours.Err(), want)
				}
				if _, err := fmt.Fprintf(conn, "pong %d\n", round); err != nil {
					t.Fatal(err)
				}
				if err := scanTo(theirs, fmt.Sprintf("pong %d", round)); err != nil {
					t.Fatal(err)
				}
				if _, err := in.Write([]byte("K\n")); err != nil {
					t.Fatal(err)
				}
				if err := scanTo(theirs, "KEYUPDATE"); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// scanTo reads lines up to one.
func scanTo(s *bufio.Scanner, line string) error {
	for s.Scan() {
		if strings.TrimSpace(s.Text()) == line {
			return nil
		}
	}
	return errors.Join(s.Err(), fmt.Errorf("openssl ended and did not print %q", line))
}

// pemFiles writes a certificate and its key to files.
func pemFiles(t *testing.T, c tls.Certificate) (cert, key string) {
	t.Helper()
	private, ok := c.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatal("not an ECDSA key")
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return cert, key
}
