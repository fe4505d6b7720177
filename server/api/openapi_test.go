package api_test

import (
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A document is what this test reads of an OpenAPI document.
type document struct {
	OpenAPI string `json:"openapi"`
	Paths   map[string]map[string]struct {
		Summary     string `json:"summary"`
		OperationID string `json:"operationId"`
		Parameters  []struct {
			Name, In string
			Required bool
		} `json:"parameters"`
		RequestBody json.RawMessage            `json:"requestBody"`
		Responses   map[string]json.RawMessage `json:"responses"`
		Security    json.RawMessage            `json:"security"`
	} `json:"paths"`
	Components struct {
		Schemas map[string]struct {
			Properties map[string]json.RawMessage `json:"properties"`
			Required   []string                   `json:"required"`
		} `json:"schemas"`
	} `json:"components"`
}

// TestOpenAPIHasEveryRoute holds the document against the route table, and what
// it says of shapes against real answers.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	status, raw := call(t, http.MethodGet, w.url+"/v1/openapi.json", "", "")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, raw)
	}
	var doc document
	if err := json.Unmarshal([]byte(raw), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.OpenAPI != "3.1.0" {
		t.Errorf("version %q", doc.OpenAPI)
	}
	routes, ids := 0, map[string]bool{}
	for _, r := range w.api.Routes() {
		routes++
		o, ok := doc.Paths[r.Pattern][strings.ToLower(r.Method)]
		if !ok || o.Summary == "" || ids[o.OperationID] || len(o.Responses) < 5 {
			t.Errorf("%s %s: not described, or not by itself: %+v", r.Method, r.Pattern, o)
		}
		ids[o.OperationID] = true
		var inPath []string
		for _, p := range o.Parameters {
			if p.In == "path" && p.Required {
				inPath = append(inPath, "{"+p.Name+"}")
			}
		}
		if want := regexp.MustCompile(`\{\w+\}`).FindAllString(r.Pattern, -1); !slices.Equal(inPath, want) {
			t.Errorf("%s %s: parameters %v, want %v", r.Method, r.Pattern, inPath, want)
		}
		public := r.Pattern == "/v1/healthz" || r.Pattern == "/v1/readyz" || r.Pattern == "/v1/openapi.json" || r.Pattern == "/v1/ca/roots"
		if public == (o.Security != nil) {
			t.Errorf("%s %s: security %s", r.Method, r.Pattern, o.Security)
		}
		if body := o.RequestBody != nil; r.Method == http.MethodPut && !body || r.Method == http.MethodGet && body {
			t.Errorf("%s %s: body %v", r.Method, r.Pattern, body)
		}
	}
	for path, methods := range doc.Paths {
		routes -= len(methods)
		if !strings.HasPrefix(path, "/v1/") {
			t.Errorf("path %s", path)
		}
	}
	if routes != 0 {
		t.Errorf("%d routes more than operations", routes)
	}
	for _, m := range regexp.MustCompile(`"\$ref":"#/components/schemas/([^"]+)"`).FindAllStringSubmatch(raw, -1) {
		if _, ok := doc.Components.Schemas[m[1]]; !ok {
			t.Errorf("nothing at %s", m[1])
		}
	}

	w.instances(t, "vm-a/one")
	for path, schema := range map[string]string{
		"/v1/status": "Status", "/v1/nodes": "List", "/v1/nodes/vm-a": "Item", "/v1/nodes/vm-b": "",
	} {
		_, text := call(t, http.MethodGet, w.url+path, w.token, "")
		var answer map[string]json.RawMessage
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if schema == "" {
			schema = "Error"
			if err := json.Unmarshal(answer["error"], &answer); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			delete(answer, "error")
		}
		for name := range answer {
			if doc.Components.Schemas[schema].Properties[name] == nil {
				t.Errorf("%s: the schema %s has no %s", path, schema, name)
			}
		}
		for _, name := range doc.Components.Schemas[schema].Required {
			if answer[name] == nil {
				t.Errorf("%s: the answer has no %s", path, name)
			}
		}
	}
}
