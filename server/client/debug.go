package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// DebugParts are the parts of a support bundle that a server makes.
func DebugParts() []string { return []string{"config", "goroutines", "heap"} }

// Debug returns one of DebugParts: settings as JSON, or a profile of the Go
// runtime. There is no secret in it.
func (c *Client) Debug(ctx context.Context, part string) ([]byte, error) {
	return c.raw(ctx, "/v1/debug/"+url.PathEscape(part))
}

// Metrics returns the metrics of the server that answers, in Prometheus' text
// format.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) { return c.raw(ctx, "/v1/metrics") }

// raw returns an answer that is no JSON, or not looked into.
func (c *Client) raw(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.send(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	return data, nil
}
