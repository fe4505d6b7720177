package docs_test

import (
	"strings"
	"testing"

	"github.com/meshd/meshd/tests/docs"
)

// TestDecoders shows that each kind of file reaches the decoder of its kind,
// and that a decoder's refusal is seen.
func TestDecoders(t *testing.T) {
	t.Parallel()
	tests := map[docs.Schema]struct{ good, bad, problem string }{
		docs.Manifest: {
			good:    "intention \"web\" \"api\" { action = \"allow\" }\n",
			bad:     "intention \"web\" \"api\" { action = \"alow\" }\n",
			problem: "snippet.hcl:1: action",
		},
		docs.Services: {
			good:    "service \"web\" {\n  port = 9002\n}\n",
			bad:     "service \"web\" {\n  prot = 9002\n}\n",
			problem: "snippet.hcl:2: prot",
		},
		docs.Server: {
			good:    "trust_domain = \"mesh.example.com\"\n",
			bad:     "trust_domain = \"mesh.example.com\"\nca { leaf_tl = \"24h\" }\n",
			problem: "snippet.hcl:2: ca.leaf_tl",
		},
		docs.Agent: {
			good:    "servers = [\"10.0.0.11\"]\n",
			bad:     "servers = [\"10.0.0.11\"]\njoin {\n  tokenfile = \"/x\"\n}\n",
			problem: "snippet.hcl:3: join.tokenfile",
		},
		docs.API: {
			good:    `{"a": [1, null]}`,
			bad:     `{"a": 1, "a": 2}`,
			problem: "a name twice",
		},
	}
	for schema, decode := range decoders() {
		t.Run(string(schema), func(t *testing.T) {
			t.Parallel()
			tt, ok := tests[schema]
			if !ok {
				t.Fatal("no example: add one that passes and one that is refused")
			}
			if err := decode("snippet.hcl", []byte(tt.good)); err != nil {
				t.Errorf("%s: %v", tt.good, err)
			}
			if err := decode("snippet.hcl", []byte(tt.bad)); err == nil || !strings.Contains(err.Error(), tt.problem) {
				t.Errorf("%s: error %v, want one with %q", tt.bad, err, tt.problem)
			}
		})
	}
}
