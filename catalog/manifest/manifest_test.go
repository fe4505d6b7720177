package manifest_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/intentions"
)

// TestFormatsAgree holds the three formats to one meaning.
func TestFormatsAgree(t *testing.T) {
	t.Parallel()
	want := []manifest.Resource{
		{Kind: manifest.KindNode, Value: catalog.Node{Name: "vm-1", Services: []string{"web"}, Labels: map[string]string{"zone": "b"}}},
		{Kind: manifest.KindIntention, Value: intentions.Intention{
			Source: "web", Destination: "api",
			Rules: []intentions.Rule{{Action: intentions.Allow, Methods: []string{"GET"}, PathPrefix: "/v1/"}},
		}},
	}
	for name, text := range map[string]string{
		"a.hcl": `node "vm-1" {
  services = ["web"]
  labels   = { zone = "b" }
}
intention "web" "api" { rules = [{ action = "allow", methods = ["GET"], path_prefix = "/v1/" }] }`,
		"a.yaml": "kind: node\nname: vm-1\nservices: [web]\nlabels: {zone: b}\n---\n" +
			"kind: intention\nsource: web\ndestination: api\nrules:\n- {action: allow, methods: [GET], path_prefix: /v1/}\n",
		"a.yml": "{kind: node, name: vm-1, services: [web], labels: {zone: b}}\n---\n" +
			"{kind: intention, source: web, destination: api, rules: [{action: allow, methods: [GET], path_prefix: /v1/}]}\n",
		"a.json": `[{"kind":"node","name":"vm-1","services":["web"],"labels":{"zone":"b"}},
{"kind":"intention","source":"web","destination":"api","rules":[{"action":"allow","methods":["GET"],"path_prefix":"/v1/"}]}]`,
	} {
		got, err := manifest.Load(name, []byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i := range got {
			got[i].File, got[i].Line = "", 0
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestEveryKind holds the table of blocks and Decode to the list of kinds.
func TestEveryKind(t *testing.T) {
	t.Parallel()
	labels := map[manifest.Kind]string{manifest.KindIntention: `"a" "b" { action = "deny" }`, manifest.KindRole: `"a" { policies = ["b"] }`}
	names := map[manifest.Kind]string{manifest.KindIntention: "a → b", manifest.KindService: "default/a"}
	for _, kind := range manifest.Kinds() {
		body, name := `"a" {}`, "a"
		if l, ok := labels[kind]; ok {
			body = l
		}
		if n, ok := names[kind]; ok {
			name = n
		}
		rs, err := manifest.Load("x.hcl", []byte(string(kind)+" "+body))
		if err != nil || len(rs) != 1 || rs[0].Kind != kind || rs[0].Name() != name {
			t.Errorf("%s: got %+v, %v", kind, rs, err)
			continue
		}
		text, err := manifest.EncodeJSON(rs[0])
		if err != nil || !bytes.HasPrefix(text, []byte(`{"kind":"`+string(kind)+`",`)) {
			t.Errorf("%s: JSON is %s, %v", kind, text, err)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	long := bytes.Repeat([]byte("#"), manifest.MaxSize+1)
	for _, name := range []string{"a.hcl", "a.yaml", "a.json"} {
		if _, err := manifest.Parse(name, long); !errors.Is(err, manifest.ErrInvalid) {
			t.Errorf("%s: %d bytes: got %v, want ErrInvalid", name, len(long), err)
		}
		if _, err := manifest.Parse(name, long[:manifest.MaxSize]); err != nil && name != "a.json" {
			t.Errorf("%s: %d bytes: %v", name, manifest.MaxSize, err)
		}
		// What is deep must be refused before something recursive reads it.
		for _, open := range []string{"[", "{a:", "(", "{a={", "- ", "!", "-", "\"${", "a ? ", "[{"} {
			text := strings.Repeat(open, (manifest.MaxSize-16)/len(open))
			if name == "a.hcl" {
				text = "x = " + text // where a value is wanted
			}
			if _, err := manifest.Parse(name, []byte(text)); !errors.Is(err, manifest.ErrInvalid) {
				t.Errorf("%s: many of %q: got %v, want ErrInvalid", name, open, err)
			}
		}
	}
}

func TestLineOf(t *testing.T) {
	t.Parallel()
	docs, err := manifest.Parse("a.yaml", []byte("kind: node\nname: vm-1\nlabels:\n  a.b: c\nservices:\n- web\n- api\n"))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"name": 2, "labels": 3, "labels.a.b": 4, "labels.x": 3, "services[0]": 6, "services[1].x[3]": 7, "absent": 1, "": 1,
	} {
		if got := docs[0].LineOf(path); got != want {
			t.Errorf("LineOf(%q) = %d, want %d", path, got, want)
		}
	}
}

func FuzzHCL(f *testing.F)  { fuzz(f, "x.hcl") }
func FuzzYAML(f *testing.F) { fuzz(f, "x.yaml") }
func FuzzJSON(f *testing.F) { fuzz(f, "x.json") }

// fuzz reads a file in every way. What can be read is written in both formats
// and must be read back as the same.
func fuzz(f *testing.F, name string) {
	f.Helper()
	for _, seed := range []string{
		"intention \"web\" \"api\" {\n  action = \"allow\"\n reason = \"$${x} \\\\d\"\n}\nnode \"a\" { labels = { a = \"1\" } }",
		"service \"web\" {\n port = 1\n check \"a\" {\n ttl = \"1s\"\n }\n upstream \"b\" { local_port = 2 }\n}",
		"node \"a\" {\n services = <<X\nweb\nX\n}\n",
		"{kind: intention, source: web, destination: api, action: allow, reason: 'no', expires: 2030-01-01T00:00:00Z}\n---\nkind: node\nname: '1'\n",
		"kind: service\nname: a\nports: [{name: b, protocol: tcp}]\nowner: |\n  x\n",
		`[{"kind":"node","name":"a","services":["*"],"labels":{"a":"\u00e9\ud83d\ude00","b":"0x1","c":"~"}}]`,
		`{"kind":"intention","source":"spiffe://a.b/*","destination":"ns/*","rules":[{"action":"deny","headers":[{"name":"a","present":true,"invert":true}]}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := manifest.Definitions(name, data); err != nil && !errors.Is(err, manifest.ErrInvalid) {
			t.Errorf("Definitions: %v is no ErrInvalid", err)
		}
		if err := manifest.DecodeConfig(name, data, &config{}); err != nil && !errors.Is(err, manifest.ErrInvalid) {
			t.Errorf("DecodeConfig: %v is no ErrInvalid", err)
		}
		rs, err := manifest.Load(name, data)
		if err != nil {
			if !errors.Is(err, manifest.ErrInvalid) {
				t.Errorf("Load: %v is no ErrInvalid", err)
			}
			return
		}
		text, err := manifest.EncodeYAML(rs...)
		if err != nil {
			t.Fatal(err)
		}
		same(t, rs, "again.yaml", text)
		for _, r := range rs {
			text, err := manifest.EncodeJSON(r)
			if err != nil {
				t.Fatal(err)
			}
			same(t, []manifest.Resource{r}, "again.json", text)
		}
	})
}

func same(t *testing.T, want []manifest.Resource, name string, text []byte) {
	t.Helper()
	got, err := manifest.Load(name, text)
	if err != nil {
		t.Fatalf("reading back %s: %v\n%s", name, err, text)
	}
	ignorePlace := cmp.FilterPath(func(p cmp.Path) bool {
		return p.Last().String() == ".File" || p.Last().String() == ".Line"
	}, cmp.Ignore())
	if diff := cmp.Diff(want, got, ignorePlace, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("%s read back (-want +got):\n%s\n%s", name, diff, text)
	}
}
