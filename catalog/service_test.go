package catalog_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/catalog"
)

func TestAgrees(t *testing.T) {
	t.Parallel()
	central := catalog.Service{Name: "api", Owner: "team", Ports: []catalog.ServicePort{
		{Name: "http", Protocol: "http", Default: true}, {Name: "admin"},
	}}
	for _, tc := range []struct {
		name  string
		other catalog.Service
		want  string // part of the error, empty for agreement
	}{
		{"same in another order, defaults written out", catalog.Service{Namespace: "default", Name: "api", Ports: []catalog.ServicePort{
			{Name: "admin", Protocol: "auto"}, {Name: "http", Protocol: "http", Default: true},
		}}, ""},
		{"other service", catalog.Service{Name: "web"}, "name is default/api in the service and default/web in the definition"},
		{"other namespace", catalog.Service{Namespace: "x", Name: "api"}, "name is default/api"},
		{"client", catalog.Service{Name: "api"}, "ports is admin,http in the service and none in the definition"},
		{"other ports", catalog.Service{Name: "api", Ports: []catalog.ServicePort{{Name: "http", Protocol: "http"}, {Name: "grpc"}}}, "grpc,http"},
		{"other protocol", catalog.Service{Name: "api", Ports: []catalog.ServicePort{
			{Name: "http", Protocol: "tcp", Default: true}, {Name: "admin"},
		}}, "ports[http].protocol is http in the service and tcp in the definition"},
		{"other default", catalog.Service{Name: "api", Ports: []catalog.ServicePort{
			{Name: "http", Protocol: "http"}, {Name: "admin", Default: true},
		}}, "ports[http].default is true in the service and false in the definition"},
		{"an upgrade that the service does not have", catalog.Service{Name: "api", Ports: []catalog.ServicePort{
			{Name: "http", Protocol: "http", Default: true, Upgrade: true}, {Name: "admin"},
		}}, "ports[http].upgrade is false in the service and true in the definition"},
	} {
		err := central.Agrees(tc.other)
		if tc.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tc.name, err)
			}
			continue
		}
		if !errors.Is(err, catalog.ErrMismatch) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want ErrMismatch with %q", tc.name, err, tc.want)
		}
	}
	single := catalog.Service{Name: "db", Ports: []catalog.ServicePort{{Name: "default", Protocol: "tcp"}}}
	if err := single.Agrees(catalog.Definition{Name: "db", Port: 5432, Protocol: "tcp"}.Service()); err != nil {
		t.Errorf("a single port is the default one: %v", err)
	}
}

func TestServicePort(t *testing.T) {
	t.Parallel()
	one := catalog.Service{Name: "a", Ports: []catalog.ServicePort{{Name: "x"}}}
	two := catalog.Service{Name: "a", Ports: []catalog.ServicePort{{Name: "x"}, {Name: "y", Protocol: "http", Default: true}}}
	for _, tc := range []struct {
		s    catalog.Service
		port string
		want catalog.ServicePort
		ok   bool
	}{
		{one, "", catalog.ServicePort{Name: "x", Protocol: "auto", Default: true}, true},
		{one, "x", catalog.ServicePort{Name: "x", Protocol: "auto", Default: true}, true},
		{one, "y", catalog.ServicePort{}, false},
		{two, "", catalog.ServicePort{Name: "y", Protocol: "http", Default: true}, true},
		{two, "x", catalog.ServicePort{Name: "x", Protocol: "auto"}, true},
		{catalog.Service{Name: "client"}, "", catalog.ServicePort{}, false},
	} {
		if got, ok := tc.s.Port(tc.port); got != tc.want || ok != tc.ok {
			t.Errorf("%v.Port(%q) = %v, %v", tc.s, tc.port, got, ok)
		}
	}
	if one.Ports[0].Protocol != "" {
		t.Error("defaults were written into the spec")
	}
}

func TestDefinitionViews(t *testing.T) {
	t.Parallel()
	d := catalog.Definition{
		Name: "web", Namespace: "batch", Port: 9002, Protocol: "http", Tags: []string{"t"},
		Checks:    []catalog.Check{{Name: "a", HTTP: "http://127.0.0.1/", Interval: catalog.Duration(time.Second), FailuresBeforeCritical: 3}},
		Upstreams: []catalog.Upstream{{Service: "api", LocalPort: 1}},
	}
	before := d
	before.Checks = append([]catalog.Check(nil), d.Checks...)
	before.Upstreams = append([]catalog.Upstream(nil), d.Upstreams...)
	service := catalog.Service{Namespace: "batch", Name: "web", Ports: []catalog.ServicePort{{Name: "default", Protocol: "http"}}}
	if diff := cmp.Diff(service, d.Service()); diff != "" {
		t.Errorf("Service (-want +got):\n%s", diff)
	}
	instance := catalog.Instance{
		Namespace: "batch", Service: "web", ID: "web", Node: "vm-1", MeshAddress: "10.0.0.1:7443", Tags: []string{"t"},
		Ports: []catalog.InstancePort{{Name: "default", Port: 9002}},
	}
	if diff := cmp.Diff(instance, d.Instance("vm-1", "10.0.0.1:7443")); diff != "" {
		t.Errorf("Instance (-want +got):\n%s", diff)
	}
	full := catalog.Definition{
		Name: "web", ID: "web", Namespace: "batch", Address: "127.0.0.1", Tags: []string{"t"},
		Ports: []catalog.DefinitionPort{{Name: "default", Port: 9002, Protocol: "http", Default: true}},
		Checks: []catalog.Check{{
			Name: "a", HTTP: "http://127.0.0.1/", Interval: catalog.Duration(time.Second), Timeout: catalog.Duration(10 * time.Second),
			Method: "GET", SuccessBeforePassing: 1, FailuresBeforeWarning: 3, FailuresBeforeCritical: 3,
		}},
		Upstreams: []catalog.Upstream{{Service: "default/api", LocalPort: 1, LocalAddress: "127.0.0.1"}},
	}
	if diff := cmp.Diff(full, d.WithDefaults()); diff != "" {
		t.Errorf("WithDefaults (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(full, full.WithDefaults()); diff != "" {
		t.Errorf("WithDefaults of defaults (-want +got):\n%s", diff)
	}
	if err := full.Validate(); err != nil {
		t.Errorf("the view with defaults is not valid: %v", err)
	}
	if diff := cmp.Diff(before, d); diff != "" {
		t.Errorf("the definition was changed (-want +got):\n%s", diff)
	}
	client := catalog.Definition{Name: "cron", ID: "c1"}.Instance("vm-1", "10.0.0.1:7443")
	if diff := cmp.Diff(catalog.Instance{Service: "cron", ID: "c1", Node: "vm-1"}, client); diff != "" {
		t.Errorf("pure client (-want +got):\n%s", diff)
	}
}

// TestUpgrade is for ports of HTTP, and an older agent that can't say it agrees with a service that has it.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	single := catalog.Definition{Name: "api", Port: 80, Protocol: "http", Upgrade: true}
	if err := single.Validate(); err != nil {
		t.Error(err)
	}
	central := single.Service()
	if !central.Ports[0].Upgrade || !single.WithDefaults().Ports[0].Upgrade {
		t.Errorf("the upgrade is lost: %+v", central)
	}
	single.Upgrade = false
	if err := central.Agrees(single.Service()); err != nil {
		t.Errorf("one that does not say it: %v", err)
	}
	for _, d := range []catalog.Definition{
		{Name: "api", Port: 80, Upgrade: true},
		{Name: "api", Port: 80, Protocol: "grpc", Upgrade: true},
		{Name: "api", Upgrade: true, Ports: []catalog.DefinitionPort{{Name: "a", Port: 80, Protocol: "http"}}},
		{Name: "api", Ports: []catalog.DefinitionPort{{Name: "a", Port: 80, Protocol: "tcp", Upgrade: true}}},
	} {
		if err := d.Validate(); err == nil || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("%+v: %v", d, err)
		}
	}
}

func TestCheckDefaults(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		in, want catalog.Check
		kind     catalog.CheckKind
	}{
		{
			catalog.Check{Name: "a", TCP: "h:1"},
			catalog.Check{Name: "a", TCP: "h:1", Timeout: catalog.DefaultCheckTimeout, SuccessBeforePassing: 1, FailuresBeforeWarning: 1, FailuresBeforeCritical: 1},
			catalog.CheckTCP,
		},
		{catalog.Check{Name: "a", TTL: 5}, catalog.Check{Name: "a", TTL: 5}, catalog.CheckTTL},
		{
			catalog.Check{Name: "a", HTTP: "u", Method: "PUT", FailuresBeforeWarning: 2, FailuresBeforeCritical: 4},
			catalog.Check{
				Name: "a", HTTP: "u", Method: "PUT", Timeout: catalog.DefaultCheckTimeout,
				SuccessBeforePassing: 1, FailuresBeforeWarning: 2, FailuresBeforeCritical: 4,
			},
			catalog.CheckHTTP,
		},
		{
			catalog.Check{Name: "a", HTTP: "u", TCP: "v"},
			catalog.Check{Name: "a", HTTP: "u", TCP: "v", Timeout: catalog.DefaultCheckTimeout, SuccessBeforePassing: 1, FailuresBeforeWarning: 1, FailuresBeforeCritical: 1},
			"",
		},
	} {
		if diff := cmp.Diff(tc.want, tc.in.WithDefaults()); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", tc.in, diff)
		}
		if got := tc.in.Kind(); got != tc.kind {
			t.Errorf("%+v: kind %q, want %q", tc.in, got, tc.kind)
		}
	}
}

func TestWorstHealth(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		checks []catalog.Health
		want   catalog.Health
	}{
		{nil, catalog.HealthPassing},
		{[]catalog.Health{"passing", "passing"}, catalog.HealthPassing},
		{[]catalog.Health{"passing", "warning"}, catalog.HealthWarning},
		{[]catalog.Health{"critical", "warning", "passing"}, catalog.HealthCritical},
		{[]catalog.Health{"warning", "unknown"}, catalog.HealthUnknown},
		{[]catalog.Health{"unknown", "critical"}, catalog.HealthCritical},
		{[]catalog.Health{"passing", ""}, catalog.HealthUnknown},
		{[]catalog.Health{"passing", "a-later-word"}, catalog.HealthUnknown},
	} {
		var states []catalog.CheckState
		for _, h := range tc.checks {
			states = append(states, catalog.CheckState{Health: h})
		}
		if got := catalog.WorstHealth(states); got != tc.want {
			t.Errorf("%v: got %q, want %q", tc.checks, got, tc.want)
		}
	}
}

func TestSelectEndpoints(t *testing.T) {
	t.Parallel()
	at := func(id string, h catalog.Health, stale, drain bool) catalog.Endpoint {
		return catalog.Endpoint{
			Instance: catalog.Instance{Service: "api", Node: "vm", ID: id},
			Status:   catalog.InstanceStatus{Health: h, Drain: drain}, Stale: stale,
		}
	}
	for _, tc := range []struct {
		name       string
		all        []catalog.Endpoint
		use, spare []string
	}{
		{"none", nil, nil, nil},
		{"sorted", []catalog.Endpoint{at("b", "passing", false, false), at("a", "warning", false, false)}, []string{"a", "b"}, nil},
		{"stale last", []catalog.Endpoint{at("a", "passing", true, false), at("b", "warning", false, false)}, []string{"b"}, []string{"a"}},
		{"stale while nothing better", []catalog.Endpoint{at("a", "passing", true, false), at("b", "critical", false, false)}, []string{"a"}, nil},
		{"refused", []catalog.Endpoint{
			at("a", "critical", false, false), at("b", "unknown", false, false), at("c", "", false, false),
			at("d", "passing", false, true), at("e", "critical", true, false), at("f", "a-later-word", false, false),
		}, nil, nil},
	} {
		use, spare := catalog.SelectEndpoints(tc.all)
		ids := func(es []catalog.Endpoint) (out []string) {
			for _, e := range es {
				out = append(out, e.Instance.ID)
			}
			return out
		}
		if diff := cmp.Diff([][]string{tc.use, tc.spare}, [][]string{ids(use), ids(spare)}, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"web", "ns/web", "*", "ns/*", "a/b/c", "-", "\xff/a", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := catalog.ParseName(s)
		if err == nil && n.String() != s && n.Short() != s {
			t.Errorf("%q is read as %v, which is written otherwise", s, n)
		}
		if (catalog.CheckPattern(s) == nil) != (err == nil || s == "*" || strings.HasSuffix(s, "/*") && catalog.CheckLabel(strings.TrimSuffix(s, "/*")) == nil) {
			t.Errorf("%q: pattern: %v, name: %v", s, catalog.CheckPattern(s), err)
		}
		if err == nil && !catalog.Covers(s, n) {
			t.Errorf("%q does not cover %v", s, n)
		}
	})
}

func TestLimits(t *testing.T) {
	tests := map[string]struct {
		limits catalog.Limits
		fields []string
	}{
		"none":       {catalog.Limits{}, nil},
		"all":        {catalog.Limits{Connections: 1, Pending: 1_000_000, Requests: 3}, nil},
		"negative":   {catalog.Limits{Connections: -1, Pending: -1, Requests: -1}, []string{"connections", "pending", "requests"}},
		"a typo's 0": {catalog.Limits{Requests: 10_000_000}, []string{"requests"}},
	}
	for name, tt := range tests {
		var got []string
		for _, e := range catalog.FieldErrors(tt.limits.Validate()) {
			got = append(got, e.Field)
		}
		if diff := cmp.Diff(tt.fields, got); diff != "" {
			t.Errorf("%s: fields with problems (-want +got):\n%s", name, diff)
		}
	}
	a, b := catalog.Limits{Connections: 5, Requests: 7}, catalog.Limits{Connections: 6, Pending: 8, Requests: 3}
	if diff := cmp.Diff(catalog.Limits{Connections: 5, Pending: 8, Requests: 3}, a.Lower(b)); diff != "" {
		t.Errorf("the lower limits (-want +got):\n%s", diff)
	}
}

func TestUpstreamOnAUnixSocket(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	tests := map[string]struct {
		upstream catalog.Upstream
		fields   []string
	}{
		"alone":           {catalog.Upstream{LocalSocket: "/run/web/api.sock"}, nil},
		"with a mode":     {catalog.Upstream{LocalSocket: "/run/web/api.sock", LocalSocketMode: "600"}, nil},
		"with a port":     {catalog.Upstream{LocalSocket: "/run/api.sock", LocalPort: 1}, []string{"local_socket"}},
		"with an address": {catalog.Upstream{LocalSocket: "/run/api.sock", LocalAddress: "127.0.0.1"}, []string{"local_socket"}},
		"a mode alone":    {catalog.Upstream{LocalPort: 1, LocalSocketMode: "0600"}, []string{"local_socket_mode"}},
		"no octal mode":   {catalog.Upstream{LocalSocket: "/run/api.sock", LocalSocketMode: "0888"}, []string{"local_socket_mode"}},
		"setuid":          {catalog.Upstream{LocalSocket: "/run/api.sock", LocalSocketMode: "4755"}, []string{"local_socket_mode"}},
		"relative":        {catalog.Upstream{LocalSocket: "api.sock"}, []string{"local_socket"}},
		"upwards":         {catalog.Upstream{LocalSocket: "/run/../etc/x"}, []string{"local_socket"}},
		"too long":        {catalog.Upstream{LocalSocket: long}, []string{"local_socket"}},
		"just fits":       {catalog.Upstream{LocalSocket: long[:107]}, nil},
	}
	for name, tt := range tests {
		tt.upstream.Service = "api"
		var got []string
		for _, e := range catalog.FieldErrors(tt.upstream.Validate()) {
			got = append(got, e.Field)
		}
		if diff := cmp.Diff(tt.fields, got); diff != "" {
			t.Errorf("%s: fields with problems (-want +got):\n%s", name, diff)
		}
	}
	one := catalog.Upstream{Service: "api", LocalSocket: "/run/api.sock"}
	d := catalog.Definition{Name: "web", Upstreams: []catalog.Upstream{one, one}}
	if errs := catalog.FieldErrors(d.Validate()); len(errs) != 1 || errs[0].Field != "upstreams[1].local_socket" {
		t.Errorf("two upstreams on one socket: %v", errs)
	}
}

func TestExternal(t *testing.T) {
	tests := map[string]struct {
		definition catalog.Definition
		fields     []string
	}{
		"a name":                {catalog.Definition{External: "db.example.com", Port: 5432}, nil},
		"a name of one label":   {catalog.Definition{External: "db-1", Port: 5432}, nil},
		"an underscore":         {catalog.Definition{External: "_db.example.com", Port: 5432}, nil},
		"an address":            {catalog.Definition{External: "10.9.8.7", Port: 5432}, nil},
		"IPv6":                  {catalog.Definition{External: "2001:db8::1", Port: 5432}, nil},
		"an upstream's port":    {catalog.Definition{External: "db.example.com", Port: 5432, Upstreams: []catalog.Upstream{{Service: "x", LocalPort: 5432}}}, nil},
		"with a port":           {catalog.Definition{External: "db.example.com:5432", Port: 5432}, []string{"external"}},
		"a URL":                 {catalog.Definition{External: "https://db.example.com", Port: 443}, []string{"external"}},
		"half an address":       {catalog.Definition{External: "10.9.8", Port: 443}, []string{"external"}},
		"metadata":              {catalog.Definition{External: "169.254.169.254", Port: 80}, []string{"external"}},
		"everywhere":            {catalog.Definition{External: "0.0.0.0", Port: 80}, []string{"external"}},
		"a final dot":           {catalog.Definition{External: "db.example.com.", Port: 80}, []string{"external"}},
		"a long label":          {catalog.Definition{External: strings.Repeat("a", 64) + ".com", Port: 80}, []string{"external"}},
		"too long":              {catalog.Definition{External: strings.Repeat("a.", 127) + "com", Port: 80}, []string{"external"}},
		"no port":               {catalog.Definition{External: "db.example.com"}, []string{"external"}},
		"TLS":                   {catalog.Definition{External: "api.example.com", Port: 443, TLS: &catalog.ExternalTLS{ServerName: "x.example.com", CAFile: "/etc/ca.pem"}}, nil},
		"TLS, wrong":            {catalog.Definition{External: "api.example.com", Port: 443, TLS: &catalog.ExternalTLS{ServerName: "x y", CAFile: "ca.pem"}}, []string{"tls.server_name", "tls.ca_file"}},
		"TLS with nobody":       {catalog.Definition{Port: 443, TLS: &catalog.ExternalTLS{}}, []string{"tls"}},
		"an application's, too": {catalog.Definition{External: "db.example.com", Port: 80, Address: "10.0.0.1"}, []string{"external"}},
	}
	for name, tt := range tests {
		tt.definition.Name = "orders-db"
		var got []string
		for _, e := range catalog.FieldErrors(tt.definition.Validate()) {
			got = append(got, e.Field)
		}
		if diff := cmp.Diff(tt.fields, got); diff != "" {
			t.Errorf("%s: fields with problems (-want +got):\n%s", name, diff)
		}
	}
	d := catalog.Definition{Name: "saas", External: "2001:db8::1", Ports: []catalog.DefinitionPort{{Name: "api", Port: 443, Default: true}, {Name: "auth", Port: 8443}}}
	full := d.WithDefaults()
	var checks []string
	for _, c := range full.Checks {
		checks = append(checks, c.Name+" "+c.TCP)
	}
	if diff := cmp.Diff([]string{"reachable-api [2001:db8::1]:443", "reachable-auth [2001:db8::1]:8443"}, checks); diff != "" {
		t.Errorf("checks (-want +got):\n%s", diff)
	}
	if full.Address != "" || full.Host() != d.External || d.Instance("vm-egress1", "10.0.0.9:7443").External != d.External || full.Validate() != nil {
		t.Errorf("%+v, %v", full, full.Validate())
	}
	for want, one := range map[string]catalog.Definition{
		"db.example.com:8443": {External: "db.example.com"},
		"other.example.com":   {External: "10.0.0.1", TLS: &catalog.ExternalTLS{ServerName: "other.example.com"}},
		"[2001:db8::1]":       {External: "2001:db8::1", TLS: &catalog.ExternalTLS{}},
	} {
		port := uint16(443)
		if one.TLS == nil {
			port = 8443
		}
		if got := one.Authority(port); got != want {
			t.Errorf("authority %q, want %q", got, want)
		}
	}
	d.Checks = []catalog.Check{{Name: "own", HTTP: "https://saas.example.com/health", Interval: catalog.Duration(time.Minute)}}
	if own := d.WithDefaults().Checks; len(own) != 1 || own[0].Name != "own" {
		t.Errorf("its own check: %+v", own)
	}
}
