package proxy_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
)

var update = flag.Bool("update", false, "write the golden files anew")

const trustDomain = "mesh.example.com"

func bundle(tb testing.TB) ca.Bundle {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := ca.NewBundle(trustDomain, root)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// plan is a valid plan with one of everything and more.
func plan() proxy.Config {
	web, api := spiffe.Service(trustDomain, "default", "web"), spiffe.Service(trustDomain, "default", "api")
	return proxy.Config{
		Position:    catalog.Position{Generation: "g1", Revision: 8841},
		TrustDomain: trustDomain,
		Zone:        "fra-1",
		Listeners: []proxy.Listener{
			{Name: "upstream/default/web/default/api/http", Kind: proxy.ListenUpstream, Address: "127.0.0.1:9191", Source: web, Cluster: "default/api:http"},
			{Name: "mesh", Kind: proxy.ListenMesh, Address: ":7443"},
		},
		Inbounds: []proxy.Inbound{
			{ServerName: "http.web.web.default.mesh", Service: web, Instance: "web", Port: "http", Protocol: "http", Local: "127.0.0.1:9002"},
		},
		Clusters: []proxy.Cluster{
			{
				Name: "default/api:http", Service: api, Port: "http", Protocol: "http", ZoneWeight: 3,
				Endpoints: []proxy.Endpoint{
					{Instance: "api-2", Node: "vm-c", Address: "10.0.0.3:7443", ServerName: "http.api-2.api.default.mesh", Tier: 1, Zone: "fra-2", Weight: 10},
					{Instance: "api-1", Node: "vm-b", Address: "[fd00::2]:7443", ServerName: "http.api-1.api.default.mesh"},
				},
			},
			{Name: "default/web>default/db:main", Service: spiffe.Service(trustDomain, "default", "db"), Port: "main", Protocol: "tcp", Denied: "no intention", Limits: catalog.Limits{Requests: 10}},
		},
		Policies: []proxy.Policy{
			{Service: catalog.Name{Namespace: "default", Name: "web"}, Intentions: []intentions.Intention{{Source: "*", Destination: "web", Action: intentions.Allow}}},
		},
	}
}

func TestSplitGolden(t *testing.T) {
	parts, err := proxy.Split(plan())
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(parts, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", "plan.parts.json")
	if *update {
		if err := os.WriteFile(path, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("the parts changed (-update writes them anew; running proxies get all parts again):\n%s", diff)
	}
}

func TestSplitAssemble(t *testing.T) {
	want := plan()
	want.Bundle = bundle(t)
	parts, err := proxy.Split(want)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(parts)
	got, err := proxy.Assemble(parts)
	if err != nil {
		t.Fatal(err)
	}
	again, err := proxy.Split(got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sorted(parts), again); diff != "" {
		t.Errorf("the plan changed on its way:\n%s", diff)
	}
	if err := got.Validate(); err != nil {
		t.Errorf("Validate: %v", err)
	}
	if !got.Bundle.Equal(want.Bundle) || got.Position != want.Position {
		t.Errorf("got position %v", got.Position)
	}
}

func sorted(parts []proxy.Part) []proxy.Part {
	parts = slices.Clone(parts)
	proxy.SortParts(parts)
	return parts
}

func TestSplitDoesNotDependOnOrder(t *testing.T) {
	a, b := plan(), plan()
	slices.Reverse(b.Listeners)
	slices.Reverse(b.Clusters)
	slices.Reverse(b.Clusters[1].Endpoints)
	partsA, errA := proxy.Split(a)
	partsB, errB := proxy.Split(b)
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(partsA, partsB); diff != "" {
		t.Errorf("the order of lists shows:\n%s", diff)
	}
	if !reflect.DeepEqual(a, plan()) {
		t.Error("Split changed its argument")
	}
}

func TestSplitRefusesTwins(t *testing.T) {
	c := plan()
	c.Listeners = append(c.Listeners, c.Listeners[0])
	if _, err := proxy.Split(c); !errors.Is(err, proxy.ErrPart) {
		t.Errorf("Split = %v, want ErrPart", err)
	}
}

func TestDiff(t *testing.T) {
	before, err := proxy.Split(plan())
	if err != nil {
		t.Fatal(err)
	}
	next := plan()
	next.Position.Revision++
	next.Clusters[0].Endpoints = next.Clusters[0].Endpoints[:1]
	next.Inbounds = nil
	after, err := proxy.Split(next)
	if err != nil {
		t.Fatal(err)
	}
	put, drop := proxy.Diff(before, after)
	var keys []string
	for _, p := range put {
		keys = append(keys, p.Key())
	}
	if diff := cmp.Diff([]string{"cluster/default/api:http", "plan/"}, keys); diff != "" {
		t.Errorf("put:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"inbound/http.web.web.default.mesh"}, drop); diff != "" {
		t.Errorf("drop:\n%s", diff)
	}
	if put, drop := proxy.Diff(after, after); len(put)+len(drop) != 0 {
		t.Errorf("equal plans differ by %v, %v", put, drop)
	}
}

func TestAssembleRefuses(t *testing.T) {
	parts, err := proxy.Split(plan())
	if err != nil {
		t.Fatal(err)
	}
	part := func(kind proxy.PartKind, name, data string) proxy.Part {
		return proxy.Part{Kind: kind, Name: name, Hash: proxy.HashPart(kind, name, []byte(data)), JSON: []byte(data)}
	}
	tests := map[string]func() []proxy.Part{
		"nothing":             func() []proxy.Part { return nil },
		"no bundle":           func() []proxy.Part { return parts[1:] },
		"a part twice":        func() []proxy.Part { return append(slices.Clone(parts), parts[1]) },
		"a wrong hash":        func() []proxy.Part { p := slices.Clone(parts); p[1].Hash = p[2].Hash; return p },
		"an unknown kind":     func() []proxy.Part { return append(slices.Clone(parts), part("magic", "x", "{}")) },
		"no JSON":             func() []proxy.Part { return append(slices.Clone(parts), part(proxy.PartCluster, "x", "{")) },
		"another name inside": func() []proxy.Part { return append(slices.Clone(parts), part(proxy.PartCluster, "x", `{"name":"y"}`)) },
		"an ID that is no ID": func() []proxy.Part {
			return append(slices.Clone(parts), part(proxy.PartCluster, "x", `{"name":"x","service":"root"}`))
		},
		"a policy of two names": func() []proxy.Part {
			return append(slices.Clone(parts), part(proxy.PartPolicy, "default/x", `{"service":"default/y"}`))
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := proxy.Assemble(tt()); !errors.Is(err, proxy.ErrPart) {
				t.Errorf("Assemble = %v, want ErrPart", err)
			}
		})
	}
}

// An older proxy must not let in what a newer policy would deny.
func TestAPolicyThatIsNotUnderstoodDenies(t *testing.T) {
	parts, err := proxy.Split(plan())
	if err != nil {
		t.Fatal(err)
	}
	for i := range parts {
		if p := &parts[i]; p.Kind == proxy.PartPolicy {
			p.JSON = bytes.Replace(p.JSON, []byte(`"action"`), []byte(`"unless_full_moon":true,"action"`), 1)
			p.Hash = proxy.HashPart(p.Kind, p.Name, p.JSON)
		}
	}
	c, err := proxy.Assemble(parts)
	if err != nil {
		t.Fatal(err)
	}
	if c.Policies[0].Unreadable == "" {
		t.Error("the policy passes for understood")
	}
	policy, err := c.Policies[0].Compile(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	request := intentions.Request{
		Source: spiffe.Service(trustDomain, "default", "any"), Destination: c.Policies[0].Service, Port: "http", Now: time.Now(),
	}
	if d := policy.Decide(request); d.Allowed {
		t.Errorf("it allows: %v", d)
	}
	if readable, err := plan().Policies[0].Compile(trustDomain); err != nil || !readable.Decide(request).Allowed {
		t.Errorf("the policy as it was does not allow, %v", err)
	}
}

func TestValidate(t *testing.T) {
	roots := bundle(t)
	other := spiffe.Service("other.example.com", "default", "web")
	tests := map[string]struct {
		change func(*proxy.Config)
		field  string
	}{
		"nothing wrong":                  {func(*proxy.Config) {}, ""},
		"the zero plan":                  {func(c *proxy.Config) { *c = proxy.Config{} }, ""},
		"no trust domain":                {func(c *proxy.Config) { c.TrustDomain = "" }, "trust_domain"},
		"no roots":                       {func(c *proxy.Config) { c.Bundle = ca.Bundle{} }, "bundle"},
		"listener without a name":        {func(c *proxy.Config) { c.Listeners[0].Name = "" }, "listeners[0].name"},
		"listener twice":                 {func(c *proxy.Config) { c.Listeners[1].Name = c.Listeners[0].Name }, "listeners[1].name"},
		"listener of an unknown kind":    {func(c *proxy.Config) { c.Listeners[0].Kind = "tap" }, "listeners[0].kind"},
		"listener at a host name":        {func(c *proxy.Config) { c.Listeners[0].Address = "localhost:1" }, "listeners[0].address"},
		"listener without a port":        {func(c *proxy.Config) { c.Listeners[0].Address = "127.0.0.1" }, "listeners[0].address"},
		"listener at a port too high":    {func(c *proxy.Config) { c.Listeners[0].Address = "127.0.0.1:65536" }, "listeners[0].address"},
		"two listeners at one address":   {func(c *proxy.Config) { c.Listeners[1].Address = c.Listeners[0].Address }, "listeners[1].address"},
		"IPv6 without brackets":          {func(c *proxy.Config) { c.Listeners[0].Address = "::1:9191" }, "listeners[0].address"},
		"upstream without a source":      {func(c *proxy.Config) { c.Listeners[0].Source = spiffe.ID{} }, "listeners[0].source"},
		"upstream of another domain":     {func(c *proxy.Config) { c.Listeners[0].Source = other }, "listeners[0].source"},
		"upstream of a node":             {func(c *proxy.Config) { c.Listeners[0].Source = spiffe.Node(trustDomain, "vm-a") }, "listeners[0].source"},
		"upstream to no cluster":         {func(c *proxy.Config) { c.Listeners[0].Cluster = "x" }, "listeners[0].cluster"},
		"mesh listener with a cluster":   {func(c *proxy.Config) { c.Listeners[1].Cluster = "default/api:http" }, "listeners[1]"},
		"inbound under another name":     {func(c *proxy.Config) { c.Inbounds[0].Instance = "web-2" }, "inbounds[0].server_name"},
		"inbound of another domain":      {func(c *proxy.Config) { c.Inbounds[0].Service = other }, "inbounds[0].service"},
		"inbound without an application": {func(c *proxy.Config) { c.Inbounds[0].Local = "" }, "inbounds[0].local"},
		"inbound of an unknown protocol": {func(c *proxy.Config) { c.Inbounds[0].Protocol = "http3" }, "inbounds[0].protocol"},
		"cluster twice":                  {func(c *proxy.Config) { c.Clusters[1].Name = c.Clusters[0].Name }, "clusters[1].name"},
		"cluster of nobody":              {func(c *proxy.Config) { c.Clusters[0].Service = spiffe.ID{} }, "clusters[0].service"},
		"cluster of another domain":      {func(c *proxy.Config) { c.Clusters[0].Service = other }, ""},
		"denied cluster with endpoints":  {func(c *proxy.Config) { c.Clusters[0].Denied = "x" }, "clusters[0].endpoints"},
		"endpoint twice":                 {func(c *proxy.Config) { c.Clusters[0].Endpoints[1] = c.Clusters[0].Endpoints[0] }, "clusters[0].endpoints[1]"},
		"endpoint without an instance":   {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].Instance = "" }, "clusters[0].endpoints[0].instance"},
		"endpoint without a port":        {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].Address = "10.0.0.3" }, "clusters[0].endpoints[0].address"},
		"endpoint with a foreign name":   {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].ServerName = "example.com" }, "clusters[0].endpoints[0].server_name"},
		"endpoint with a weight of 101":  {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].Weight = 101 }, "clusters[0].endpoints[0].weight"},
		"endpoint with a weight of -1":   {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].Weight = -1 }, "clusters[0].endpoints[0].weight"},
		"mesh on a unix socket":          {func(c *proxy.Config) { c.Listeners[1].Address = "unix:/run/x.sock" }, "listeners[1].address"},
		"unix socket without a path":     {func(c *proxy.Config) { c.Listeners[0].Address = "unix:" }, "listeners[0].address"},
		"unix socket of a strange mode":  {func(c *proxy.Config) { c.Listeners[0].Address, c.Listeners[0].SocketMode = "unix:/run/x.sock", "rw" }, "listeners[0].address"},
		"limit of -1 requests":           {func(c *proxy.Config) { c.Clusters[0].Limits.Requests = -1 }, "clusters[0].limits.requests"},
		"zone with a weight of -1":       {func(c *proxy.Config) { c.Clusters[0].ZoneWeight = -1 }, "clusters[0].zone_weight"},
		"endpoint below the best tier":   {func(c *proxy.Config) { c.Clusters[0].Endpoints[0].Tier = -1 }, "clusters[0].endpoints[0].tier"},
		"policy twice":                   {func(c *proxy.Config) { c.Policies = append(c.Policies, c.Policies[0]) }, "policies[1].service"},
		"policy that is not valid":       {func(c *proxy.Config) { c.Policies[0].Intentions[0].Action = "perhaps" }, "policies[0].intentions"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := plan()
			c.Bundle = roots
			tt.change(&c)
			err := c.Validate()
			if tt.field == "" {
				if err != nil {
					t.Errorf("Validate: %v", err)
				}
				return
			}
			var fields []string
			for _, f := range catalog.FieldErrors(err) {
				fields = append(fields, f.Field)
			}
			if !slices.ContainsFunc(fields, func(f string) bool { return strings.HasPrefix(f, tt.field) }) {
				t.Errorf("Validate = %v with fields %q, want one of %q", err, fields, tt.field)
			}
		})
	}
}

func FuzzAssemble(f *testing.F) {
	parts, err := proxy.Split(plan())
	if err != nil {
		f.Fatal(err)
	}
	for _, p := range parts {
		f.Add(string(p.Kind), p.Name, []byte(p.JSON))
	}
	f.Fuzz(func(t *testing.T, kind, name string, data []byte) {
		all := []proxy.Part{{Kind: proxy.PartKind(kind), Name: name, Hash: proxy.HashPart(proxy.PartKind(kind), name, data), JSON: data}}
		for _, p := range parts {
			if p.Key() != all[0].Key() {
				all = append(all, p)
			}
		}
		c, err := proxy.Assemble(all)
		if err != nil {
			if !errors.Is(err, proxy.ErrPart) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if c.Validate() != nil {
			return
		}
		again, err := proxy.Split(c)
		if err != nil {
			t.Fatalf("a valid plan can't be split: %v", err)
		}
		if _, err := proxy.Assemble(again); err != nil {
			t.Fatalf("a valid plan does not survive: %v", err)
		}
	})
}
