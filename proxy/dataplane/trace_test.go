package dataplane_test

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
)

// Trace context belongs to the applications (W3C Trace Context, and the two forms of B3): the mesh neither changes nor makes it.
func TestTraceContextPasses(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(r.Header) })
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	c := client(t)
	tests := map[string]http.Header{
		"none": {},
		"w3c": {
			"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
			"Tracestate":  {"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "third=x"},
			"Baggage":     {"userId=alice, serverNode=DF%2028"},
		},
		"b3 single": {"B3": {"80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"}},
		"b3 multi": {
			"X-B3-Traceid": {"80f198ee56343ba864fe8b2a57d3eff7"}, "X-B3-Spanid": {"e457b5a2e4d86bd1"},
			"X-B3-Parentspanid": {"05e3ac9a4f6e3b90"}, "X-B3-Sampled": {"1"}, "X-Request-Id": {"r-1"},
		},
		"malformed": {"Traceparent": {"00-nonsense", "00-twice"}},
	}
	for name, sent := range tests {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.upstream+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = sent.Clone()
			req.Header.Set("User-Agent", "test")
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			var got http.Header
			if err := json.NewDecoder(res.Body).Decode(&got); err != nil {
				t.Fatal(err)
			}
			for _, ours := range []string{"User-Agent", "X-Forwarded-Client-Cert"} {
				if len(got[ours]) != 1 {
					t.Errorf("%s came %d times, want once", ours, len(got[ours]))
				}
				delete(got, ours)
			}
			if diff := cmp.Diff(sent, got); diff != "" {
				t.Errorf("fields at the application (-sent +got):\n%s", diff)
			}
		})
	}
}
