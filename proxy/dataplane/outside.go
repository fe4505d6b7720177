package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/proxy/sock"
)

// outside is a destination outside the mesh, which an inbound stands for.
type outside struct {
	local     string
	authority []byte      // of requests
	http      bool        // it is declared to be HTTP/1
	tls       *tls.Config // nil: plain
	roots     *rootsFile  // nil: those of this host

	mu      sync.Mutex
	failing string // why the newest handshake failed; "" if it did not
}

var (
	errRoots   = errors.New("no certificate in it")
	errNoHTTP2 = errors.New("it does not speak HTTP/2; is its port declared http2 or grpc by mistake?")
)

// newOutside returns nil for an application of this host.
func newOutside(in proxy.Inbound) *outside {
	if in.Outside == nil {
		return nil
	}
	o := &outside{local: in.Local, authority: []byte(in.Outside.Authority), http: in.Protocol == catalog.ProtocolHTTP}
	if in.Outside.TLS == nil {
		return o
	}
	o.tls = &tls.Config{ServerName: in.Outside.TLS.ServerName, MinVersion: tls.VersionTLS12}
	if in.Outside.TLS.CAFile != "" {
		o.roots = &rootsFile{path: in.Outside.TLS.CAFile}
	}
	return o
}

// prepare makes a request one for the outside: it is called by its own name, and who called is nobody's business there.
func (o *outside) prepare(r *l7.Head) {
	r.Authority = o.authority
	r.Fields = slices.DeleteFunc(r.Fields, func(f http1.Field) bool { return f.ID == http1.ForwardedClientCert })
}

// dialApp connects to what an inbound stands for, to speak a version of HTTP or none.
func (p *Plane) dialApp(ctx context.Context, local string, o *outside, v version) (net.Conn, error) {
	nc, err := p.dialTCP(ctx, local)
	if err != nil || o == nil || o.tls == nil {
		if err != nil {
			return nil, err // not a nil *net.TCPConn
		}
		return nc, nil
	}
	conn, err := o.secure(ctx, nc, v)
	o.told(p.log, err)
	if err != nil {
		_ = nc.Close()
		return nil, err
	}
	return conn, nil
}

// secure makes a TLS connection of a plain one: with the name and the roots that the definition says, and nothing of the mesh's.
func (o *outside) secure(ctx context.Context, nc net.Conn, v version) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, nameConnect)
	defer cancel()
	config := o.tls.Clone()
	switch {
	case v == two:
		config.NextProtos = []string{alpnHTTP2}
	case v == one && o.http:
		config.NextProtos = []string{alpnHTTP1}
	}
	if o.roots != nil {
		roots, err := o.roots.read()
		if err != nil {
			return nil, fmt.Errorf("roots of %s: %w", o.tls.ServerName, err)
		}
		config.RootCAs = roots
	}
	conn := tls.Client(nc, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS with %s: %w", o.tls.ServerName, err)
	}
	if v == two && conn.ConnectionState().NegotiatedProtocol != alpnHTTP2 {
		return nil, fmt.Errorf("TLS with %s: %w", o.tls.ServerName, errNoHTTP2)
	}
	return conn, nil
}

// told logs when handshakes begin to fail, or to succeed again.
func (o *outside) told(log *slog.Logger, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	o.mu.Lock()
	changed := text != o.failing
	o.failing = text
	o.mu.Unlock()
	switch {
	case !changed:
	case err != nil:
		log.Warn("a destination outside the mesh can't be reached by TLS", slog.String("address", o.local), slog.Any("error", err))
	default:
		log.Info("a destination outside the mesh is reached by TLS", slog.String("address", o.local))
	}
}

// rootsFile is a PEM file that is read again when it has changed.
type rootsFile struct {
	path string

	mu   sync.Mutex
	at   time.Time
	size int64
	pool *x509.CertPool
}

func (r *rootsFile) read() (*x509.CertPool, error) {
	info, err := os.Stat(r.path)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pool != nil && r.at.Equal(info.ModTime()) && r.size == info.Size() {
		return r.pool, nil
	}
	pem, err := os.ReadFile(r.path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: %w", r.path, errRoots)
	}
	r.pool, r.at, r.size = pool, info.ModTime(), info.Size()
	return pool, nil
}

// streamOf makes what dialApp returned a side of a TCP session.
func streamOf(nc net.Conn) stream {
	switch c := nc.(type) {
	case *tls.Conn:
		return tlsStream{c}
	case *net.TCPConn:
		return sock.New(c)
	default:
		return nil
	}
}

// tlsStream is TLS with somebody who is no proxy. It keeps its memory while it waits, as crypto/tls does.
type tlsStream struct{ *tls.Conn }

// ReadLent implements stream.
func (s tlsStream) ReadLent(l sock.Lender) (int, error) {
	n, err := s.Read(l.Lend())
	if n == 0 {
		l.Return()
	}
	return n, err
}
