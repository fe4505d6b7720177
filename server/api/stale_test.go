package api_test

import (
	"net/http"
	"testing"
	"time"
)

// TestStale reads what a server has that may be behind the others.
func TestStale(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct {
		age    time.Duration
		query  string
		status int
		header string
	}{
		{0, "?stale=true", http.StatusOK, "0.000"},
		{1500 * time.Millisecond, "?stale=true", http.StatusOK, "1.500"},
		{1500 * time.Millisecond, "", http.StatusOK, ""},
		{6 * time.Second, "?stale=true", http.StatusServiceUnavailable, ""},
		{6 * time.Second, "?stale=true&max_stale=10s", http.StatusOK, "6.000"},
		{6 * time.Second, "?stale=true&max_stale=1ms", http.StatusServiceUnavailable, ""},
		{0, "?stale=true&max_stale=soon", http.StatusBadRequest, ""},
		{0, "?max_stale=5s", http.StatusBadRequest, ""},
	} {
		w.age.Store(int64(c.age))
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/v1/nodes"+c.query, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+w.token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close() // not read
		if have := resp.Header.Get("Mesh-Stale-Age"); resp.StatusCode != c.status || have != c.header {
			t.Errorf("age %s, %q: %d with age %q, want %d with %q", c.age, c.query, resp.StatusCode, have, c.status, c.header)
		}
	}
}
