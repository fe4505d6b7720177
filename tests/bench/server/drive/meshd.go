package drive

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/meshd/meshd/server/client"
)

var errRoots = errors.New("the roots hold no certificate")

func tlsConfig(roots string) (*tls.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(roots)) {
		return nil, errRoots
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// meshdWriter writes records of nodes.
type meshdWriter struct {
	http *http.Client
	base string
	auth string
}

func newMeshd(address, roots, token string) (Writer, error) {
	config, err := tlsConfig(roots)
	if err != nil {
		return nil, err
	}
	return &meshdWriter{
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig: config, MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute, DisableCompression: true,
		}},
		base: "https://" + address + "/v1/nodes/",
		auth: "Bearer " + token,
	}, nil
}

// Write implements Writer.
func (w *meshdWriter) Write(ctx context.Context, key string, value []byte, expect uint64) (uint64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("%s%s?revision=%d", w.base, key, expect), bytes.NewReader(value))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", w.auth)
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.http.Do(req)
	if err != nil {
		return 0, err
	}
	body, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("status %d: %s", resp.StatusCode, strings.TrimSpace(string(body)))
	}
	var out struct {
		Changes []struct {
			Change   string `json:"change"`
			Revision uint64 `json:"revision"`
		} `json:"changes"`
	}
	if err := json.Unmarshal(body, &out); err != nil {
		return 0, err
	}
	if len(out.Changes) != 1 || out.Changes[0].Revision == 0 || out.Changes[0].Change == client.ChangeUnchanged {
		return 0, fmt.Errorf("the answer names no change: %s", body)
	}
	return out.Changes[0].Revision, nil
}

// Close implements Writer.
func (w *meshdWriter) Close() { w.http.CloseIdleConnections() }
