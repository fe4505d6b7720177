package load_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/bench/load"
)

// h2c serves HTTP/2 with prior knowledge.
func h2c(t *testing.T, handler http.Handler) string {
	t.Helper()
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

// through is a proxy of the standard library before a server of HTTP/2.
func through(t *testing.T, address string) string {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})
	proxy.Transport = &http.Transport{Protocols: protocols, DisableCompression: true}
	proxy.FlushInterval = -1
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	return h2c(t, proxy)
}

// Every kind of call, from end to end and through a proxy that knows nothing of
// either.
func TestHTTP2(t *testing.T) {
	_, _, direct := backend(t)
	for where, address := range map[string]string{"direct": direct, "through net/http": through(t, direct)} {
		for name, job := range map[string]load.Job{
			"GET 100 B":        {Call: load.CallGet, Path: load.SmallPath, Length: load.SmallLength},
			"GET 10 KiB":       {Call: load.CallGet, Path: load.LargePath, Length: load.LargeLength},
			"unary 100 B":      {Call: load.CallUnary, Path: load.UnaryPath + load.SmallPath, Length: 5 + load.SmallLength},
			"unary 10 KiB":     {Call: load.CallUnary, Path: load.UnaryPath + load.LargePath, Length: 5 + load.LargeLength},
			"streaming 100 B":  {Call: load.CallStreaming, Path: load.StreamingPath + load.SmallPath, Length: 5 + load.SmallLength},
			"streaming 10 KiB": {Call: load.CallStreaming, Path: load.StreamingPath + load.LargePath, Length: 5 + load.LargeLength},
			"beside slow ones": {Call: load.CallGet, Path: load.LargePath, Length: load.LargeLength, Slow: 2},
			"at a rate":        {Call: load.CallGet, Path: load.SmallPath, Length: load.SmallLength, Rate: 1000},
		} {
			t.Run(where+", "+name, func(t *testing.T) {
				job.Address, job.Connections, job.Streams, job.Window, job.Requests = address, 2, 8, time.Minute, 300
				if job.Rate > 0 {
					job.Window, job.Requests = time.Second/2, 0 // how many they are, the machine says
				}
				out, err := job.Do(t.Context())
				if want := max(job.Requests, 1); err != nil || out.Requests < want || out.P50 <= 0 || out.Bytes < int64(out.Requests*job.Length) {
					t.Errorf("%d requests, %d bytes, p50 %s, error %v; want %d", out.Requests, out.Bytes, out.P50, err, want)
				}
			})
		}
	}
}

func flush(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() }

// What a client must not take for an answer.
func TestHTTP2Refuses(t *testing.T) {
	for want, handler := range map[string]http.HandlerFunc{
		"not a 200 response": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, strings.Repeat("x", 99), http.StatusBadGateway)
		},
		"bytes short": func(w http.ResponseWriter, _ *http.Request) {
			flush(w)
			_, _ = io.WriteString(w, "short")
		},
		"more than the 100": func(w http.ResponseWriter, _ *http.Request) {
			flush(w)
			_, _ = w.Write(make([]byte, 101))
		},
		"was reset": func(w http.ResponseWriter, _ *http.Request) { flush(w); panic(http.ErrAbortHandler) },
	} {
		t.Run(want, func(t *testing.T) {
			job := load.Job{Address: h2c(t, handler), Call: load.CallGet, Path: "/", Length: 100, Connections: 1, Streams: 2, Window: time.Second}
			if out, err := job.Do(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%d requests, error %v", out.Requests, err)
			}
		})
	}
	t.Run("trailers without success", func(t *testing.T) {
		address := h2c(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = w.Write(make([]byte, 105))
			w.Header().Set("Grpc-Status", "14")
		}))
		job := load.Job{Address: address, Call: load.CallUnary, Path: load.UnaryPath + load.SmallPath, Length: 105, Connections: 1, Streams: 1, Window: time.Second}
		if out, err := job.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "trailers without success") {
			t.Errorf("%d requests, error %v", out.Requests, err)
		}
	})
}

// The backend answers net/http's client, which does not know it.
func TestHTTP2Backend(t *testing.T) {
	_, _, address := backend(t)
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://api.default.mesh"+load.EchoPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Test", "1")
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(text), "x-test: 1\r\n") || !strings.Contains(string(text), ":path: "+load.EchoPath+"\r\n") {
		t.Errorf("the request arrives as %q, %v", text, err)
	}
}
