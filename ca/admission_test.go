package ca_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// meet makes a handshake between two configurations, and returns what each side says.
func meet(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	near, far := net.Pipe()
	served := make(chan error, 1)
	go func() {
		conn := tls.Server(far, server)
		err := conn.Handshake()
		if err == nil {
			_, err = conn.Write([]byte("x"))
		}
		served <- err
		_ = far.Close()
	}()
	conn := tls.Client(near, client)
	clientErr = conn.Handshake()
	if clientErr == nil {
		_, clientErr = io.ReadFull(conn, make([]byte, 1)) // the server's verdict comes after the handshake
	}
	_ = near.Close()
	return <-served, clientErr
}

func admission(t *testing.T, key ca.ClusterKey, trustDomain, name string) *ca.Admission {
	t.Helper()
	a, err := ca.NewAdmission(key, trustDomain, name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAdmission(t *testing.T) {
	key := ca.GenerateClusterKey()
	one, two := admission(t, key, home, "one"), admission(t, key, home, "two")
	otherKey, otherDomain := admission(t, ca.GenerateClusterKey(), home, "two"), admission(t, key, foreign, "two")
	for name, test := range map[string]struct {
		server *ca.Admission
		client *tls.Config
		want   error // what the client says; nil: both sides are content
	}{
		"the one that was meant, raft": {one, two.ClientConfig("one", ca.ALPNRaft), nil},
		"the one that was meant, peer": {one, two.ClientConfig("one", ca.ALPNPeer), nil},
		"any server":                   {one, two.ClientConfig("", ca.ALPNPeer), nil},
		"another than was meant":       {one, two.ClientConfig("three", ca.ALPNPeer), ca.ErrUnexpectedPeer},
		"client of another key":        {one, otherKey.ClientConfig("", ca.ALPNPeer), ca.ErrUntrusted},
		"server of another key":        {otherKey, one.ClientConfig("", ca.ALPNPeer), ca.ErrUntrusted},
		"client of another domain":     {one, otherDomain.ClientConfig("", ca.ALPNPeer), ca.ErrUnexpectedPeer},
		"server of another domain":     {otherDomain, one.ClientConfig("", ca.ALPNPeer), ca.ErrUnexpectedPeer},
	} {
		t.Run(name, func(t *testing.T) {
			serverErr, clientErr := meet(t, test.server.ServerConfig(), test.client)
			if !errors.Is(clientErr, test.want) {
				t.Errorf("client: %v, want %v", clientErr, test.want)
			}
			if (test.want == nil) != (serverErr == nil) {
				t.Errorf("server: %v", serverErr)
			}
		})
	}
	if _, err := ca.NewAdmission(ca.ClusterKey{}, home, "one"); !errors.Is(err, ca.ErrClusterKey) {
		t.Errorf("without a key: %v", err)
	}
	if _, err := ca.NewAdmission(key, home, "No Label"); err == nil {
		t.Error("a name that is no label was taken")
	}
	if got := one.ID(); got != spiffe.Server(home, "one") {
		t.Errorf("one is %s", got)
	}
}

// TestAdmissionRefusesTheMesh has certificates that are good elsewhere: those of a mesh's own CA, home's and a foreign one's.
func TestAdmissionRefusesTheMesh(t *testing.T) {
	a := admission(t, ca.GenerateClusterKey(), home, "one")
	for _, test := range []struct {
		id   spiffe.ID
		want error
	}{
		{spiffe.Server(home, "two"), ca.ErrUntrusted},
		{spiffe.Server(foreign, "two"), ca.ErrUnexpectedPeer},
		{vm, ca.ErrUnexpectedPeer},
		{web, ca.ErrUnexpectedPeer},
	} {
		leaf := newAuthority(t, test.id.TrustDomain).leaf(t, test.id)
		config := a.ClientConfig("", ca.ALPNPeer)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return leaf.TLS(), nil }
		if serverErr, clientErr := meet(t, a.ServerConfig(), config); !errors.Is(serverErr, test.want) || clientErr == nil {
			t.Errorf("%s as a client: %v, %v", test.id, serverErr, clientErr)
		}
		listener := a.ServerConfig()
		listener.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return leaf.TLS(), nil }
		if _, clientErr := meet(t, listener, a.ClientConfig("", ca.ALPNRaft)); !errors.Is(clientErr, test.want) {
			t.Errorf("%s as a server: %v", test.id, clientErr)
		}
	}
}

// TestAdmissionRefusesForms has clients that hold the cluster key but do not behave.
func TestAdmissionRefusesForms(t *testing.T) {
	key := ca.GenerateClusterKey()
	one, two := admission(t, key, home, "one"), admission(t, key, home, "two")
	for name, change := range map[string]func(*tls.Config){
		"another protocol": func(c *tls.Config) { c.NextProtos = []string{"h2"} },
		"no protocol":      func(c *tls.Config) { c.NextProtos = nil },
		"TLS 1.2":          func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"no certificate":   func(c *tls.Config) { c.GetClientCertificate = nil },
	} {
		config := two.ClientConfig("", ca.ALPNPeer)
		config.VerifyConnection = nil
		change(config)
		if serverErr, clientErr := meet(t, one.ServerConfig(), config); serverErr == nil || clientErr == nil {
			t.Errorf("%s was admitted: %v, %v", name, serverErr, clientErr)
		}
	}
	served, err := two.ServerConfig().GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := served.Leaf.Verify(x509.VerifyOptions{}); err == nil {
		t.Error("an admission certificate is good for the system's roots")
	}
}

// TestAdmissionRenews gets a new certificate at half of the last one's time, and when the clock was set back.
func TestAdmissionRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := ca.GenerateClusterKey()
		one, two := admission(t, key, home, "one"), admission(t, key, home, "two")
		present := func() *tls.Certificate {
			cert, err := one.ServerConfig().GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			return cert
		}
		first := present()
		<-time.After(ca.AdmissionTTL/2 - time.Minute)
		if present() != first {
			t.Error("it was renewed early")
		}
		<-time.After(2 * time.Minute)
		if second := present(); second == first || !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
			t.Error("it was not renewed at half of its time")
		}
		<-time.After(10 * ca.AdmissionTTL)
		if serverErr, clientErr := meet(t, one.ServerConfig(), two.ClientConfig("one", ca.ALPNRaft)); serverErr != nil || clientErr != nil {
			t.Errorf("ten lives later: %v, %v", serverErr, clientErr)
		}
	})
}

// TestAdmissionToleratesClocks has a peer whose clock is wrong: its certificate is made at its time, and judged at ours. Every
// bubble begins at the same instant.
func TestAdmissionToleratesClocks(t *testing.T) {
	const start = 48 * time.Hour
	for _, test := range []struct {
		ahead time.Duration
		want  error
	}{
		{5 * time.Minute, nil},
		{-5 * time.Minute, nil},
		{time.Hour, nil},
		{-time.Hour, nil},
		{11 * time.Hour, nil},
		{-11 * time.Hour, nil},
		{25 * time.Hour, ca.ErrNotYetValid},
		{-25 * time.Hour, ca.ErrExpired},
	} {
		key := ca.GenerateClusterKey()
		var presented *tls.Certificate
		synctest.Test(t, func(t *testing.T) {
			<-time.After(start + test.ahead)
			var err error
			if presented, err = admission(t, key, home, "two").ServerConfig().GetCertificate(nil); err != nil {
				t.Fatal(err)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			<-time.After(start)
			one, two := admission(t, key, home, "one"), admission(t, key, home, "two")
			client := two.ClientConfig("one", ca.ALPNPeer)
			client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return presented, nil }
			if serverErr, clientErr := meet(t, one.ServerConfig(), client); !errors.Is(serverErr, test.want) || (test.want == nil) != (clientErr == nil) {
				t.Errorf("a peer that is %s ahead: %v, %v; want %v", test.ahead, serverErr, clientErr, test.want)
			}
		})
	}
}
