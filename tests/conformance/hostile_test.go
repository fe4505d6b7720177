package conformance_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// headMemory is how much a proxy may grow by while peers send it what never
// ends.
const headMemory = 32 << 20

// hello is what a peer brings to the mesh port. The zero value brings nothing.
type hello struct {
	certificate *tls.Certificate
	serverName  string
	alpn        []string
	maxVersion  uint16
	plain       bool
}

// knock sends a request to the mesh port and returns what came back.
func (s *stand) knock(h hello) ([]byte, error) {
	nc, err := net.DialTimeout("tcp", s.pair.Mesh, patience)
	if err != nil {
		return nil, err
	}
	defer nc.Close() //nolint:errcheck // it is read to its end
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if !h.plain {
		cfg := &tls.Config{
			InsecureSkipVerify: true, ServerName: h.serverName, NextProtos: h.alpn, MaxVersion: h.maxVersion, MinVersion: tls.VersionTLS10,
		}
		if h.certificate != nil {
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return h.certificate, nil }
		}
		nc = tls.Client(nc, cfg)
	}
	if _, err := io.WriteString(nc, "GET /ok/x HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n"); err != nil {
		return nil, err
	}
	return io.ReadAll(nc)
}

// certificate signs what a test wants to see refused.
func certificate(t *testing.T, by *rig.Authority, change func(*x509.Certificate), ids ...spiffe.ID) *tls.Certificate {
	t.Helper()
	template := rig.Template(ids...)
	if change != nil {
		change(template)
	}
	cert, key, err := by.Sign(template)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// TestMeshPortRefuses knocks with everything but a good identity.
func TestMeshPortRefuses(t *testing.T) { //nolint:tparallel // its rows share one application's record
	t.Parallel()
	s := newStand(t, "go", golang)
	web := spiffe.Service(trustDomain, catalog.DefaultNamespace, "web")
	sameName, err := rig.NewAuthority(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rig.NewAuthority("other.test")
	if err != nil {
		t.Fatal(err)
	}
	good := hello{certificate: certificate(t, s.authority, nil, web), serverName: rig.ServerName("go"), alpn: []string{"http/1.1"}}
	with := func(change func(*hello)) hello {
		h := good
		change(&h)
		return h
	}
	proves := func(c *tls.Certificate) hello { return with(func(h *hello) { h.certificate = c }) }
	mine := func(change func(*x509.Certificate), ids ...spiffe.ID) hello {
		return proves(certificate(t, s.authority, change, ids...))
	}
	if got, err := s.knock(good); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 200 ") {
		t.Fatalf("the good peer got %q, %v", got, err)
	}
	s.settle(t)
	for name, h := range map[string]hello{
		"plaintext":                  {plain: true},
		"TLS 1.2":                    with(func(h *hello) { h.maxVersion = tls.VersionTLS12 }),
		"TLS 1.1":                    with(func(h *hello) { h.maxVersion = tls.VersionTLS11 }),
		"no certificate":             with(func(h *hello) { h.certificate = nil }),
		"no server name":             with(func(h *hello) { h.serverName = "" }),
		"an unknown server name":     with(func(h *hello) { h.serverName = "http.two.go.default.mesh" }),
		"another's server name":      with(func(h *hello) { h.serverName = "example.com" }),
		"a long server name":         with(func(h *hello) { h.serverName = strings.Repeat("a.", 120) + "mesh" }),
		"no ALPN":                    with(func(h *hello) { h.alpn = nil }),
		"an unknown ALPN":            with(func(h *hello) { h.alpn = []string{"h3"} }),
		"HTTP called TCP":            with(func(h *hello) { h.alpn = []string{"mesh-tcp"} }),
		"our identity, another root": proves(certificate(t, sameName, nil, web)),
		"our identity, signed by another trust domain": proves(certificate(t, other, nil, web)),
		"another trust domain":                         proves(certificate(t, other, nil, spiffe.Service("other.test", catalog.DefaultNamespace, "web"))),
		"another trust domain, signed by us":           mine(nil, spiffe.Service("other.test", catalog.DefaultNamespace, "web")),
		"no identity":                                  mine(func(c *x509.Certificate) { c.DNSNames = []string{"web"} }),
		"two identities":                               mine(nil, web, spiffe.Service(trustDomain, catalog.DefaultNamespace, "go")),
		"expired":                                      mine(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, web),
		"not yet valid":                                mine(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, web),
		"a CA":                                         mine(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }, web),
		"no usage":                                     mine(func(c *x509.Certificate) { c.ExtKeyUsage = nil }, web),
		"a server's usage":                             mine(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, web),
		"any usage":                                    mine(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, web),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := s.knock(h)
			if strings.Contains(string(got), "HTTP/") || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the peer got %q, %v; want a closed connection and no answer", got, err)
			}
			if seen := s.settle(t); len(seen) > 0 {
				t.Errorf("the application saw %+v", seen)
			}
		})
	}
	for name, id := range map[string]spiffe.ID{
		"another service":      spiffe.Service(trustDomain, catalog.DefaultNamespace, "batch"),
		"the same name abroad": spiffe.Service(trustDomain, "abroad", "web"),
		"a node":               spiffe.Node(trustDomain, "web"),
		"a server":             spiffe.Server(trustDomain, "web"),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := s.knock(mine(nil, id))
			if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 403 ") || !strings.Contains(string(got), "mesh-error: denied\r\n") {
				t.Errorf("the peer got %q, %v; want it denied", got, err)
			}
			if seen := s.settle(t); len(seen) > 0 {
				t.Errorf("the application saw %+v", seen)
			}
		})
	}
}

// settle sends a request that passes, and returns what the application saw
// before it.
func (s *stand) settle(t *testing.T) []sight {
	t.Helper()
	return s.fence(t, mesh).sights
}

// TestSlowPeers holds the time that a peer may take, on both sides of the
// handshake: all at once, as each takes seconds.
func TestSlowPeers(t *testing.T) {
	t.Parallel()
	s := newStand(t, "go", golang)
	knock := func(door) (net.Conn, error) { return net.DialTimeout("tcp", s.pair.Mesh, patience) }
	const head = "GET /ok/x HTTP/1.1\r\nHost: app\r\nX-A: "
	var peers sync.WaitGroup
	for _, row := range []struct {
		name   string
		dial   func(door) (net.Conn, error)
		door   door
		first  string
		drip   time.Duration
		within time.Duration
	}{
		{"silent", knock, mesh, "", 0, 5 * time.Second},
		{"half a record", knock, mesh, "\x16\x03\x01\x02\x00\x01\x00", 0, 5 * time.Second},
		{"a handshake byte by byte", knock, mesh, "\x16\x03\x01\x02\x00\x01", 200 * time.Millisecond, 5 * time.Second},
		{"a huge handshake", knock, mesh, "\x16\x03\x01\x40\x00\x01\xff\xff\xff", 0, 5 * time.Second},
		{"a head byte by byte, upstream", s.dial, upstream, head, 200 * time.Millisecond, 10 * time.Second},
		{"a head byte by byte, mesh", s.dial, mesh, head, 200 * time.Millisecond, 10 * time.Second},
	} {
		peers.Go(func() {
			nc, err := row.dial(row.door)
			if err != nil {
				t.Errorf("%s: %v", row.name, err)
				return
			}
			took, err := closedAfter(nc, row.first, row.drip)
			if err != nil || took > row.within+3*time.Second {
				t.Errorf("%s: closed after %s, want %s: %v", row.name, took, row.within, err)
			}
		})
	}
	peers.Wait()
}

// closedAfter sends first, then a byte now and then, until the other side
// closes, and returns how long that took.
func closedAfter(nc net.Conn, first string, drip time.Duration) (time.Duration, error) {
	defer nc.Close() //nolint:errcheck // the other side has closed
	began := time.Now()
	if err := nc.SetDeadline(began.Add(30 * time.Second)); err != nil {
		return 0, err
	}
	if _, err := io.WriteString(nc, first); err != nil {
		return 0, err
	}
	ended := make(chan struct{})
	var dripping sync.WaitGroup
	if drip > 0 {
		ticker := time.NewTicker(drip)
		defer ticker.Stop()
		dripping.Go(func() {
			for {
				select {
				case <-ticker.C:
					if _, err := nc.Write([]byte("a")); err != nil {
						return
					}
				case <-ended:
					return
				}
			}
		})
	}
	_, err := io.Copy(io.Discard, nc)
	took := time.Since(began)
	close(ended)
	dripping.Wait()
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil // closed or reset: both end it
	}
	return took, err
}

// TestEndlessInput sends what never ends on many connections at once.
func TestEndlessInput(t *testing.T) { //nolint:tparallel // one after the other: the sum of memory counts
	t.Parallel()
	s := newStand(t, "go", golang)
	before := s.memory(t)
	long := strings.Repeat("a", 1<<20)
	for name, row := range map[string]struct {
		raw    string
		status []int
	}{
		"method":          {long, []int{400, 414, 431}},
		"target":          {"GET /ok/" + long, []int{414}},
		"one line":        {"GET /ok/x HTTP/1.1\r\nHost: app\r\nX-A: " + long, []int{431}},
		"many lines":      {"GET /ok/x HTTP/1.1\r\nHost: app\r\n" + strings.Repeat("X-A: bcdefghij\r\n", 1<<16), []int{431}},
		"long lines":      {"GET /ok/x HTTP/1.1\r\nHost: app\r\n" + strings.Repeat("X-A: "+long[:8000]+"\r\n", 128), []int{431}},
		"chunk extension": {chunked("5;" + long), []int{400, 431}},
		"trailers":        {chunked("0\r\n" + strings.Repeat("X-A: bcdefghij\r\n", 1<<16)), []int{400, 431}},
	} {
		for _, d := range []door{upstream, mesh} {
			t.Run(string(d)+"/"+name, func(t *testing.T) {
				var peers sync.WaitGroup
				for range 32 {
					peers.Go(func() {
						// A response may be lost in the reset that what was
						// not read causes.
						got, _ := s.send(d, row.raw, false)
						if len(got) > 1 || len(got) == 1 && !slices.Contains(row.status, got[0].status) {
							t.Errorf("got %+v, want one of %v", got, row.status)
						}
					})
				}
				peers.Wait()
			})
		}
	}
	after := s.memory(t)
	for i, name := range []string{"caller", "callee"} {
		if grown := int64(after[i]) - int64(before[i]); grown > headMemory {
			t.Errorf("the %s grew by %d KiB, at most %d are allowed", name, grown>>10, headMemory>>10)
		}
	}
	if seen := s.settle(t); len(seen) > 0 {
		for _, sight := range seen {
			if sight.Line != "POST /ok/x" { // its body was refused, not its head
				t.Errorf("the application saw %+v", sight)
			}
		}
	}
}

// memory returns the private memory of caller and callee.
func (s *stand) memory(t *testing.T) [2]uint64 {
	t.Helper()
	var out [2]uint64
	for i, p := range []*rig.Process{s.pair.Caller, s.pair.Callee} {
		private, err := rig.PrivateMemory(p.PID())
		if err != nil {
			t.Fatal(err)
		}
		out[i] = private
	}
	return out
}

// TestSilentCrowd holds that peers who open connections and say nothing do not
// keep others out.
func TestSilentCrowd(t *testing.T) {
	t.Parallel()
	s := newStand(t, "go", golang)
	const crowd = 600
	for range crowd {
		nc, err := net.DialTimeout("tcp", s.pair.Mesh, patience)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nc.Close() }) // the proxy may have
	}
	began := time.Now()
	got, err := s.send(mesh, "GET /ok/x HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n", false)
	if err != nil || len(got) != 1 || got[0].status != 200 {
		t.Errorf("behind %d silent peers a good one got %+v, %v", crowd, got, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("behind %d silent peers a good one waited %s", crowd, took)
	}
}
