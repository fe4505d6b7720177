package plan_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/agent/plan"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/proxy"
)

var update = flag.Bool("update", false, "write the golden files") //nolint:gochecknoglobals // a flag

// input is the JSON form of plan.Inputs.
type input struct {
	About       string          `json:"about"`
	Zone        string          `json:"zone"`
	MeshListen  string          `json:"mesh_listen"`
	Definitions json.RawMessage `json:"definitions"`
	View        struct {
		Position catalog.Position `json:"position"`
		Topics   []struct {
			view.Topic
			Items map[string]json.RawMessage `json:"items"`
		} `json:"topics"`
	} `json:"view"`
}

// output is what a golden file holds: the bundle is the same in all.
type output struct {
	Topics   []view.Topic   `json:"topics"`
	Plan     proxy.Config   `json:"plan"`
	Problems []plan.Problem `json:"problems,omitempty"`
}

func bundle(t *testing.T) ca.Bundle {
	t.Helper()
	pem, err := os.ReadFile("testdata/root.pem")
	if err != nil {
		t.Fatal(err)
	}
	b, err := ca.ParseRootsPEM(pem)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t *testing.T, file string) plan.Inputs {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var in input
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	definitions, err := manifest.Definitions("definitions.json", in.Definitions)
	if err != nil {
		t.Fatal(err)
	}
	content := map[view.Topic]map[string][]byte{}
	for _, topic := range in.View.Topics {
		items := map[string][]byte{}
		for key, data := range topic.Items {
			items[key] = data
		}
		content[topic.Topic] = items
	}
	return plan.Inputs{
		TrustDomain: "mesh.example.com", Bundle: bundle(t), Zone: in.Zone, MeshListen: in.MeshListen, Definitions: definitions,
		View: view.NewSnapshot(in.View.Position, content),
	}
}

func build(t *testing.T, in plan.Inputs) []byte {
	t.Helper()
	config, problems := plan.Build(in)
	if err := config.Validate(); err != nil {
		t.Errorf("mesh-proxy would refuse the plan: %v", err)
	}
	if _, err := proxy.Split(config); err != nil {
		t.Errorf("the plan can't be cut into parts: %v", err)
	}
	config.Bundle = ca.Bundle{}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(output{Topics: plan.Topics(in.Definitions), Plan: config, Problems: problems}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestGolden holds each plan to a file. -update writes them: read the
// difference before you commit it.
func TestGolden(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.in.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden pairs: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".in.json")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := build(t, read(t, file))
			golden := strings.TrimSuffix(file, ".in.json") + ".golden.json"
			if *update {
				if err := os.WriteFile(golden, got, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("the plan differs from %s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

// TestOrderDoesNotMatter builds from definitions in every rotation, and from
// maps, whose order Go randomizes.
func TestOrderDoesNotMatter(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"several", "problems"} {
		in := read(t, "testdata/"+name+".in.json")
		want := build(t, in)
		for range 2 * len(in.Definitions) {
			in.Definitions = append(slices.Clone(in.Definitions[1:]), in.Definitions[0])
			if name == "problems" {
				in.Definitions = slices.Clone(in.Definitions)
				slices.Reverse(in.Definitions)
			}
			if diff := cmp.Diff(string(want), string(build(t, in))); diff != "" {
				t.Fatalf("%s: the order of definitions shows in the plan: %s", name, diff)
			}
		}
	}
}

func TestNothingKnown(t *testing.T) {
	t.Parallel()
	config, problems := plan.Build(plan.Inputs{})
	if diff := cmp.Diff(proxy.Config{}, config); diff != "" || problems != nil {
		t.Errorf("the plan of nothing: %s, %v", diff, problems)
	}
}

// FuzzBuild gives Build whatever a server could send: it must make a plan that
// the proxy takes, and never allow by mistake: a policy that could not be read
// has no allow.
func FuzzBuild(f *testing.F) {
	f.Add("service", []byte(`{"name":"api","ports":[{"name":"http","protocol":"http"}]}`), []byte(`{"source":"web","destination":"api","action":"allow"}`))
	f.Add("instance/vm-b/api", []byte(`{"service":"api","id":"api","node":"vm-b","mesh_address":"10.0.0.2:7443","ports":[{"name":"http","port":8080}]}`), []byte(`{"source":"web"`))
	f.Add("status/vm-b/api", []byte(`{"health":"passing"}`), []byte(`{"source":"*","destination":"*","rules":[{"action":"allow"}],"later":1}`))
	f.Add("denied", []byte(`{"reason":1}`), []byte(`null`))
	web, api := catalog.Name{Namespace: "default", Name: "web"}, catalog.Name{Namespace: "default", Name: "api"}
	definitions := []catalog.Definition{
		{Name: "web", Port: 80, Upstreams: []catalog.Upstream{{Service: "api", LocalPort: 9191}}},
		{Name: "api", Port: 81},
	}
	f.Fuzz(func(t *testing.T, key string, data, intention []byte) {
		in := plan.Inputs{
			TrustDomain: "mesh.example.com", Bundle: bundle(t), MeshListen: ":7443", Definitions: definitions,
			View: view.NewSnapshot(catalog.Position{Generation: "g", Revision: 1}, map[view.Topic]map[string][]byte{
				view.Upstream(web, api): {
					key: data, "service": []byte(`{"name":"api","ports":[{"name":"http"}]}`),
					"instance/vm-b/api": []byte(`{"service":"api","id":"api","node":"vm-b","mesh_address":"10.0.0.2:7443","ports":[{"name":"http","port":8080}]}`),
					"status/vm-b/api":   []byte(`{"health":"passing"}`),
				},
				view.Intentions(api): {"x": intention},
			}),
		}
		config, _ := plan.Build(in)
		if err := config.Validate(); err != nil {
			t.Fatalf("mesh-proxy would refuse the plan: %v", err)
		}
	})
}
