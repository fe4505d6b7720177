package conformance_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/meshd/meshd/tests/conformance/rig"
)

// TestHTTP2Upstreams: nginx, which ends each connection in good order after a few requests, and nghttpd answer what comes
// over our connections of HTTP/2: every request of many at once, whole.
func TestHTTP2Upstreams(t *testing.T) {
	t.Parallel()
	files := t.TempDir()
	want := map[string][sha256.Size]byte{}
	for _, size := range []int{0, 1, 10_000, 3 << 20} {
		body := bytes.Repeat([]byte("0123456789abcdef!"), size/17+1)[:size]
		name := fmt.Sprintf("%d.bin", size)
		if err := os.WriteFile(filepath.Join(files, name), body, 0o600); err != nil {
			t.Fatal(err)
		}
		want[name] = sha256.Sum256(body)
	}
	for name, start := range map[string]func(t *testing.T) string{
		"nginx": func(t *testing.T) string {
			t.Helper()
			address, socket, err := rig.Listen()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = socket.Close() }) // nginx has its own
			nginx, err := rig.StartNginx(t.TempDir(), "events { worker_connections 500; }\n", fmt.Sprintf(
				"access_log off;\nserver { listen %s http2; root %s; keepalive_requests 20; }\n", address, files), []*os.File{socket}, nil)
			if err != nil {
				t.Fatal(err)
			}
			stopAfter(t, nginx)
			return address
		},
		"nghttpd": func(t *testing.T) string {
			t.Helper()
			path, err := rig.Find("nghttpd")
			if err != nil {
				t.Fatal(err)
			}
			address, port := free(t)
			nghttpd, err := rig.Start(path, []string{"--no-tls", "-a", "127.0.0.1", "-d", files, port}, rig.Options{})
			if err != nil {
				t.Fatal(err)
			}
			stopAfter(t, nghttpd)
			listening(t, address)
			return address
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := listenHTTP2(t, http2Upstream(t, start(t)))
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() {
					n := newNeighbour(t)
					for range 10 {
						for name, sum := range want {
							if err := fetch(t.Context(), n.client, "http://"+address+"/"+name, sum); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			clients.Wait()
		})
	}
}

func stopAfter(t *testing.T, p *rig.Process) {
	t.Helper()
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// fetch gets a file that must have the sum.
func fetch(ctx context.Context, c *http.Client, url string, sum [sha256.Size]byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || sha256.Sum256(body) != sum) {
		err = fmt.Errorf("status %d, another body of %d bytes: %.100s", resp.StatusCode, len(body), body)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", url, err)
	}
	return nil
}
