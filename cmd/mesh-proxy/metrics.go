package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// metricsRetry is the wait before a metrics address that is taken is tried again.
	metricsRetry = time.Second
	// lastScrape is how long a scrape that runs may take when this process stops to serve them.
	lastScrape = time.Second
)

// scrapes answers GET /metrics. It is the only use of net/http in the process.
type scrapes struct {
	address string
	from    prometheus.Gatherer
	log     *slog.Logger

	mu       sync.Mutex
	listener *net.TCPListener // that is served
}

// socket returns a duplicate of the listening socket for a successor, nil if there is none.
func (s *scrapes) socket() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener == nil {
		return nil
	}
	f, err := s.listener.File()
	if err != nil {
		return nil // it was closed; a successor opens its own
	}
	return f
}

// serve answers until ctx ends. An address that is taken does not stop the data plane: it is tried again. inherited is the socket
// of an earlier process, or nil.
func (s *scrapes) serve(ctx context.Context, inherited *os.File) error {
	if s.address == "" {
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.from, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}
	var open sync.WaitGroup
	srv.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Done()
		default:
		}
	}
	defer func() { endScrapes(srv, &open) }()
	ticker := time.NewTicker(metricsRetry)
	defer ticker.Stop()
	for warned := false; ; {
		l, err := s.listen(ctx, inherited)
		inherited = nil
		if err == nil {
			stop := context.AfterFunc(ctx, func() { _ = l.Close() })
			err = srv.Serve(l)
			stop()
		}
		if ctx.Err() != nil {
			return nil
		}
		if !warned {
			s.log.LogAttrs(ctx, slog.LevelError, "metrics can't be served now; see --metrics", slog.Any("error", err))
			warned = true
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// endScrapes ends a server whose Serve has returned: every connection that it has accepted is counted. Shutdown would drop
// requests that it has not read yet.
func endScrapes(srv *http.Server, open *sync.WaitGroup) {
	srv.SetKeepAlivesEnabled(false)
	answered := make(chan struct{})
	go func() {
		open.Wait()
		close(answered)
	}()
	last := time.NewTimer(lastScrape)
	defer last.Stop()
	select {
	case <-answered:
	case <-last.C:
	}
	_ = srv.Close()
	<-answered
}

func (s *scrapes) listen(ctx context.Context, inherited *os.File) (net.Listener, error) {
	var l net.Listener
	var err error
	if inherited != nil {
		l, err = net.FileListener(inherited)
		_ = inherited.Close()
	}
	if l == nil || err != nil || l.Addr().String() != s.address {
		if l != nil {
			_ = l.Close() // the address was changed
		}
		var lc net.ListenConfig
		l, err = lc.Listen(ctx, "tcp", s.address)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener, _ = l.(*net.TCPListener)
	return l, nil
}
