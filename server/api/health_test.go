package api_test

import (
	"net/http"
	"testing"
	"time"
)

// A server that lost its leader lives, and is not ready.
func TestReadiness(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, row := range []struct {
		age         time.Duration
		ready, live int
	}{
		{0, http.StatusOK, http.StatusOK},
		{2 * time.Second, http.StatusOK, http.StatusOK},
		{2*time.Second + 1, http.StatusServiceUnavailable, http.StatusOK},
		{time.Hour, http.StatusServiceUnavailable, http.StatusOK},
	} {
		w.age.Store(int64(row.age))
		if status, body := call(t, http.MethodGet, w.url+"/v1/readyz", "", ""); status != row.ready {
			t.Errorf("after %s: readyz %d %s", row.age, status, body)
		}
		if status, body := call(t, http.MethodGet, w.url+"/v1/healthz", "", ""); status != row.live {
			t.Errorf("after %s: healthz %d %s", row.age, status, body)
		}
	}
}
