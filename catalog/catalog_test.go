package catalog_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	strict "github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
)

func TestParseName(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	for in, want := range map[string]catalog.Name{
		"web":              {Namespace: "default", Name: "web"},
		"batch/web":        {Namespace: "batch", Name: "web"},
		"0/9":              {Namespace: "0", Name: "9"},
		"a-b/c--d":         {Namespace: "a-b", Name: "c--d"},
		long + "/" + long:  {Namespace: long, Name: long},
		"":                 {},
		"/":                {},
		"/web":             {},
		"web/":             {},
		"a/b/c":            {},
		"Web":              {},
		"-web":             {},
		"web-":             {},
		"we_b":             {},
		"web.":             {},
		"*":                {},
		"ns/*":             {},
		"wéb":              {},
		"web\n":            {},
		long + "a":         {},
		"default/" + " ":   {},
		"default/\x00":     {},
		"default//web":     {},
		"xn--web-9oa/caf√": {},
	} {
		got, err := catalog.ParseName(in)
		if got != want {
			t.Errorf("ParseName(%q) = %v, want %v", in, got, want)
		}
		if want.IsZero() != errors.Is(err, catalog.ErrName) {
			t.Errorf("ParseName(%q): error %v", in, err)
		}
		if err != nil {
			continue
		}
		for _, text := range []string{got.String(), got.Short()} {
			if again, err := catalog.ParseName(text); err != nil || again != got {
				t.Errorf("ParseName(%q) = %v, %v, want %v", text, again, err, got)
			}
		}
	}
}

func TestNameIsTextInJSON(t *testing.T) {
	t.Parallel()
	in := map[catalog.Name]int{{Namespace: "default", Name: "web"}: 1}
	text, err := json.Marshal(in)
	if err != nil || string(text) != `{"default/web":1}` {
		t.Fatalf("got %s, %v", text, err)
	}
	var out map[catalog.Name]int
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(in, out); diff != "" {
		t.Error(diff)
	}
	if err := json.Unmarshal([]byte(`{"a/b/c":1}`), &out); !errors.Is(err, catalog.ErrName) {
		t.Errorf("got %v, want ErrName", err)
	}
}

func TestMayRun(t *testing.T) {
	t.Parallel()
	web, batchWeb, api := catalog.Name{Namespace: "default", Name: "web"}, catalog.Name{Namespace: "batch", Name: "web"},
		catalog.Name{Namespace: "default", Name: "api"}
	for _, tc := range []struct {
		patterns           []string
		web, batchWeb, api bool
	}{
		{nil, false, false, false},
		{[]string{"web"}, true, false, false},
		{[]string{"default/web"}, true, false, false},
		{[]string{"batch/web"}, false, true, false},
		{[]string{"batch/*"}, false, true, false},
		{[]string{"default/*"}, true, false, true},
		{[]string{"*"}, true, true, true},
		{[]string{"web", "batch/*"}, true, true, false},
		{[]string{"*/web", "w*", "web*", "", "/", "*/*", "**", "WEB", "default/"}, false, false, false},
	} {
		n := catalog.Node{Name: "vm-1", Services: tc.patterns}
		got := []bool{n.MayRun(web), n.MayRun(batchWeb), n.MayRun(api)}
		if diff := cmp.Diff([]bool{tc.web, tc.batchWeb, tc.api}, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.patterns, diff)
		}
	}
	all := catalog.Node{Services: []string{"*", "default/*"}}
	for _, bad := range []catalog.Name{{}, {Namespace: "default"}, {Name: "web"}, {Namespace: "default", Name: "*"}, {Namespace: "*", Name: "web"}} {
		if all.MayRun(bad) {
			t.Errorf("MayRun(%q) is true for what is no name of a service", bad)
		}
	}
}

func TestPosition(t *testing.T) {
	t.Parallel()
	a5, a6, b9 := catalog.Position{Generation: "a", Revision: 5}, catalog.Position{Generation: "a", Revision: 6},
		catalog.Position{Generation: "b", Revision: 9}
	for _, tc := range []struct {
		p, o catalog.Position
		want bool
	}{{a6, a5, true}, {a5, a6, false}, {a5, a5, false}, {b9, a5, false}, {a5, b9, false}} {
		if got := tc.p.After(tc.o); got != tc.want {
			t.Errorf("%v.After(%v) = %v", tc.p, tc.o, got)
		}
	}
	for _, p := range []catalog.Position{{}, a5, {Generation: "a:b", Revision: 1 << 63}} {
		if got, err := catalog.ParsePosition(p.String()); err != nil || got != p {
			t.Errorf("ParsePosition(%q) = %v, %v", p, got, err)
		}
	}
	for _, bad := range []string{"", "5", "a:", "a:-1", "a:x", "a:99999999999999999999"} {
		if got, err := catalog.ParsePosition(bad); err == nil {
			t.Errorf("ParsePosition(%q) = %v, want an error", bad, got)
		}
	}
}

func TestDuration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"0s": 0, "1s": time.Second, "500ms": 500 * time.Millisecond, "24h": 24 * time.Hour, "10m": 10 * time.Minute,
		"1h30m": 90 * time.Minute, "1h0m5s": time.Hour + 5*time.Second, "10h10m": 610 * time.Minute, "20h": 20 * time.Hour, "-2h": -2 * time.Hour,
	} {
		var d catalog.Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d.Std() != want {
			t.Errorf("%q is read as %v, %v", text, d.Std(), err)
		}
		if got := d.String(); got != text {
			t.Errorf("%v is written as %q, want %q", want, got, text)
		}
	}
	for _, bad := range []string{"", "1", "1 s", "1d", "s", "1,5s"} {
		var d catalog.Duration
		if err := d.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is read as %v, want an error", bad, d)
		}
	}
}

func TestClosest(t *testing.T) {
	t.Parallel()
	names := []string{"allow", "deny", "intention", "interval", "trust_domain", "port", "ports"}
	for in, want := range map[string]string{
		"alow": "allow", "dney": "deny", "intentoin": "intention", "trust_domian": "trust_domain", "prot": "port",
		"Port": "port", "prots": "ports", "port": "port", "x": "", "": "", "zzzz": "", "observe": "", "intervall": "interval",
		strings.Repeat("a", 1000): "",
	} {
		if got := catalog.Closest(in, names); got != want {
			t.Errorf("Closest(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	var inner, p catalog.Problems
	if p.Err() != nil {
		t.Fatal("no problem is an error")
	}
	inner.Add("", "whole")
	inner.Add("name", "bad %d", 1)
	inner.Add("[0]", "item")
	p.Add("first", "x")
	p.Under("a[2]", inner.Err())
	p.Under("b", nil)
	p.Under("c", errors.New("foreign"))
	var got []string
	for _, f := range catalog.FieldErrors(p.Err()) {
		got = append(got, f.Error())
	}
	want := []string{"first: x", "a[2]: whole", "a[2].name: bad 1", "a[2][0]: item", "c: foreign"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// fields returns the paths that Validate complains of.
func fields(err error) []string {
	var all []string
	for _, f := range catalog.FieldErrors(err) {
		all = append(all, f.Field)
	}
	return all
}

func TestInstanceValidate(t *testing.T) {
	t.Parallel()
	good := catalog.Instance{
		Service: "api", ID: "api:1", Node: "vm-1", MeshAddress: "[fd00::1]:7443",
		Ports: []catalog.InstancePort{{Name: "http", Port: 8080, ServerName: "http.api.api.default.mesh"}},
		Tags:  []string{"blue"}, Meta: map[string]string{"v.1": "ü"},
	}
	for _, tc := range []struct {
		name   string
		change func(*catalog.Instance)
		want   []string
	}{
		{"good", func(*catalog.Instance) {}, nil},
		{"client", func(i *catalog.Instance) { i.Ports, i.MeshAddress = nil, "" }, nil},
		{"no address", func(i *catalog.Instance) { i.MeshAddress = "" }, []string{"mesh_address"}},
		{"address without port", func(i *catalog.Instance) { i.MeshAddress = "10.0.0.1" }, []string{"mesh_address"}},
		{"weight of a heavy one", func(i *catalog.Instance) { i.Weight = catalog.MaxWeight }, nil},
		{"weight above the limit", func(i *catalog.Instance) { i.Weight = catalog.MaxWeight + 1 }, []string{"weight"}},
		{"weight below 0", func(i *catalog.Instance) { i.Weight = -1 }, []string{"weight"}},
		{"zone", func(i *catalog.Instance) { i.Zone = "eu-west_1.a" }, nil},
		{"zone with a space", func(i *catalog.Instance) { i.Zone = "eu west" }, []string{"zone"}},
		{"address with port 0", func(i *catalog.Instance) { i.MeshAddress = "10.0.0.1:0" }, []string{"mesh_address"}},
		{"address with user", func(i *catalog.Instance) { i.MeshAddress = "a@b:1" }, []string{"mesh_address"}},
		{"id with slash", func(i *catalog.Instance) { i.ID = "a/b" }, []string{"id"}},
		{"id of dots", func(i *catalog.Instance) { i.ID = ".." }, []string{"id"}},
		{"names", func(i *catalog.Instance) { i.Namespace, i.Service, i.Node = "A", "", "vm 1" }, []string{"namespace", "service", "node"}},
		{"ports", func(i *catalog.Instance) {
			i.Ports = []catalog.InstancePort{{Name: "a", Port: 1}, {Name: "a"}, {Name: "B", Port: 2, ServerName: strings.Repeat("x", 254)}}
		}, []string{"ports[1].name", "ports[1].port", "ports[2].name", "ports[2].server_name"}},
		{"meta", func(i *catalog.Instance) {
			i.Meta = map[string]string{"a": "\x00", "b": strings.Repeat("x", 513), "": "c"}
		}, []string{"meta", "meta.a", "meta.b"}},
		{"tags", func(i *catalog.Instance) { i.Tags = []string{"\xff", "a", "a"} }, []string{"tags[0]", "tags[2]"}},
	} {
		i := good
		tc.change(&i)
		if diff := cmp.Diff(tc.want, fields(i.Validate())); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

// TestSpecsInJSON: a spec decodes strictly from what it was encoded as, by both
// encoders, and its field names are the surface's.
func TestSpecsInJSON(t *testing.T) {
	t.Parallel()
	def := catalog.Definition{
		Name: "web", ID: "web-1", Namespace: "batch", Port: 9002, Protocol: "http", Address: "127.0.0.2", Tags: []string{"a"},
		Meta: map[string]string{"b": "c"},
		Checks: []catalog.Check{{
			Name: "alive", HTTP: "http://127.0.0.1:1/", Interval: catalog.Duration(time.Second), Timeout: catalog.Duration(time.Second),
			Method: "GET", Header: map[string][]string{"A": {"b"}}, SuccessBeforePassing: 1, FailuresBeforeWarning: 2, FailuresBeforeCritical: 3,
		}, {Name: "b", TTL: catalog.Duration(time.Minute)}, {Name: "c", TCP: "127.0.0.1:1"}},
		Upstreams: []catalog.Upstream{{Service: "api", Port: "http", LocalPort: 1, LocalAddress: "127.0.0.3"}},
		Ports:     []catalog.DefinitionPort{{Name: "http", Port: 1, Protocol: "tcp", Default: true}},
	}
	const want = `{"name":"web","id":"web-1","namespace":"batch","port":9002,"ports":[{"name":"http","port":1,"protocol":"tcp","default":true}],` +
		`"protocol":"http","address":"127.0.0.2","tags":["a"],"meta":{"b":"c"},"checks":[{"name":"alive","http":"http://127.0.0.1:1/",` +
		`"interval":"1s","timeout":"1s","method":"GET","header":{"A":["b"]},"success_before_passing":1,"failures_before_warning":2,` +
		`"failures_before_critical":3},{"name":"b","ttl":"1m"},{"name":"c","tcp":"127.0.0.1:1"}],` +
		`"upstreams":[{"service":"api","port":"http","local_port":1,"local_address":"127.0.0.3"}]}`
	for name, marshal := range map[string]func(any) ([]byte, error){
		"encoding/json": json.Marshal,
		"strict":        func(v any) ([]byte, error) { return strict.Marshal(v) },
	} {
		text, err := marshal(def)
		if err != nil || string(text) != want {
			t.Errorf("%s: got %s, %v\nwant %s", name, text, err, want)
		}
	}
	var again catalog.Definition
	if err := strict.Unmarshal([]byte(want), &again, strict.RejectUnknownMembers(true)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(def, again); diff != "" {
		t.Error(diff)
	}
	if text, err := json.Marshal(catalog.Definition{Name: "a"}); err != nil || string(text) != `{"name":"a"}` {
		t.Errorf("a definition of a name alone is %s, %v", text, err)
	}
}
