package rpc_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// onA lists what is registered on vm-a.
func (c *cluster) onA() []string {
	var out []string
	for key := range c.state.Snapshot().InstancesOn("vm-a") {
		out = append(out, key.String())
	}
	return out
}

func TestRegister(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	client := c.dial(c.join("vm-a", "web", "api"))
	all := []*meshpb.Registration{
		definition(t, "vm-a", web("web-1"), catalog.HealthPassing),
		definition(t, "vm-a", web("web-2"), catalog.HealthCritical),
		definition(t, "vm-a", api(""), catalog.HealthPassing),
	}
	first := register(t, client, all...)
	if diff := cmp.Diff([]string{"default/api/vm-a/api", "default/web/vm-a/web-1", "default/web/vm-a/web-2"}, c.onA()); diff != "" {
		t.Fatalf("registered (-want +got):\n%s", diff)
	}
	key := catalog.InstanceKey{Service: catalog.Name{Namespace: "default", Name: "web"}, Node: "vm-a", ID: "web-2"}
	health, _ := state.InstanceStatuses.Get(c.state.Snapshot(), key)
	if health.Value.Health != catalog.HealthCritical || string(health.Raw) != string(all[1].GetStatus()) {
		t.Errorf("status %s", health.Raw)
	}
	again := register(t, client, all...)
	if again.GetPosition().GetRevision() != first.GetPosition().GetRevision() || len(again.GetRefusals()) != 0 {
		t.Errorf("repeating wrote something: %v after %v, %v", again.GetPosition(), first.GetPosition(), again.GetRefusals())
	}
	register(t, client, all[0])
	if diff := cmp.Diff([]string{"default/web/vm-a/web-1"}, c.onA()); diff != "" {
		t.Errorf("what is not listed stays (-want +got):\n%s", diff)
	}
	if _, ok := state.InstanceStatuses.Get(c.state.Snapshot(), key); ok {
		t.Error("the status of a removed instance stays")
	}
	if _, ok := state.Services.Get(c.state.Snapshot(), catalog.Name{Namespace: "default", Name: "api"}); !ok {
		t.Error("a service went with its last instance")
	}
}

// More than a transaction holds is written in parts.
func TestRegisterMany(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	client := c.dial(c.join("vm-a", "*"))
	var all []*meshpb.Registration
	for i := range 100 {
		d := web(fmt.Sprintf("web-%d", i))
		if i%3 == 0 {
			d.Meta = map[string]string{"big": strings.Repeat("x", 400)}
		}
		all = append(all, definition(t, "vm-a", d, catalog.HealthPassing))
	}
	if res := register(t, client, all...); len(res.GetRefusals()) != 0 || len(c.onA()) != 100 {
		t.Fatalf("%d registered, refusals %v", len(c.onA()), res.GetRefusals())
	}
	register(t, client)
	if n := len(c.onA()); n != 0 {
		t.Errorf("%d stay", n)
	}
}

func TestRegisterRefused(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	client := c.dial(c.join("vm-a", "web", "stagging/*"))
	c.update(func(tx *state.Tx) error {
		return state.Namespaces.Put(tx, "staging", catalog.Namespace{Name: "staging"})
	})
	good := definition(t, "vm-a", web(""), catalog.HealthPassing)
	register(t, client, good)
	tcp := web("t")
	tcp.Protocol = catalog.ProtocolTCP
	mixed := definition(t, "vm-a", web("m"), catalog.HealthPassing)
	mixed.Service = encode(t, api("").Service())
	for _, row := range []struct {
		name string
		bad  *meshpb.Registration
		says string
	}{
		{"not permitted", definition(t, "vm-a", api(""), catalog.HealthPassing), "may not run api"},
		{"on another node", definition(t, "vm-b", web("b"), catalog.HealthPassing), "this is node vm-a"},
		{"another protocol", definition(t, "vm-a", tcp, catalog.HealthPassing), "differs"},
		{"no namespace", definition(t, "vm-a", catalog.Definition{Name: "web", Namespace: "stagging", Port: 1}, catalog.HealthPassing), `did you mean "staging"`},
		{"of another service", mixed, "comes with service"},
		{"garbage", &meshpb.Registration{Instance: []byte("{"), Service: []byte("{}"), Status: []byte("{}")}, "instance"},
		{"twice", good, "twice"},
		{"two spellings", &meshpb.Registration{
			Service:  good.GetService(),
			Instance: []byte(`{"service":"web","id":"x","node":"vm-b","Node":"vm-a"}`), Status: good.GetStatus(),
		}, "spelling"},
		{"a field twice", &meshpb.Registration{
			Service:  []byte(`{"name":"web","name":"web"}`),
			Instance: []byte(`{"service":"web","id":"x","node":"vm-a"}`), Status: good.GetStatus(),
		}, "twice"},
		{"huge", definition(t, "vm-a", catalog.Definition{Name: "web", ID: "h", Port: 1, Protocol: "http", Meta: map[string]string{"x": strings.Repeat("x", 300<<10)}}, catalog.HealthPassing), ""},
	} {
		res := register(t, client, good, row.bad)
		if len(res.GetRefusals()) != 1 || !strings.Contains(res.GetRefusals()[0].GetReason(), row.says) {
			t.Errorf("%s: refusals %v", row.name, res.GetRefusals())
		}
		if diff := cmp.Diff([]string{"default/web/vm-a/web"}, c.onA()); diff != "" {
			t.Errorf("%s: the good one is gone, or the bad one there (-want +got):\n%s", row.name, diff)
		}
	}
}

// The word of the node's record counts at every moment.
func TestPermissionsTakenAway(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leaf := c.join("vm-a", "web", "api")
	client := c.dial(leaf)
	register(t, client, definition(t, "vm-a", web(""), catalog.HealthPassing), definition(t, "vm-a", api(""), catalog.HealthPassing))
	c.update(func(tx *state.Tx) error {
		return state.Nodes.Put(tx, "vm-a", catalog.Node{Name: "vm-a", Services: []string{"web"}})
	})
	c.until(func(s *state.Snapshot) bool { return !s.Runs("vm-a", catalog.Name{Namespace: "default", Name: "api"}) })
	if diff := cmp.Diff([]string{"default/web/vm-a/web"}, c.onA()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	c.update(func(tx *state.Tx) error { state.Nodes.Delete(tx, "vm-a"); return nil })
	_, err := client.Register(t.Context(), &meshpb.RegisterRequest{})
	if reason, _ := meshpb.ReasonOf(err); reason != meshpb.ReasonNodeUnknown {
		t.Errorf("a deleted node: %v", err)
	}
	c.until(func(s *state.Snapshot) bool {
		return !s.Runs("vm-a", catalog.Name{Namespace: "default", Name: "web"}) && state.NodeIdentities.Len(s) == 0 && state.NodeStatuses.Len(s) == 0
	})
	c.join("vm-a", "web") // the name is free again
}

// until waits for the state to become so.
func (c *cluster) until(so func(*state.Snapshot) bool) {
	c.tb.Helper()
	for {
		snapshot := c.state.Snapshot()
		if so(snapshot) {
			return
		}
		select {
		case <-c.state.Changed(snapshot):
		case <-c.tb.Context().Done():
			c.tb.Fatal("it never came so")
		}
	}
}

func TestSign(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leafA := c.join("vm-a", "web", "batch")
	a, b := c.dial(leafA), c.dial(c.join("vm-b", "api"))
	register(t, a, definition(t, "vm-a", web(""), catalog.HealthPassing))
	register(t, b, definition(t, "vm-b", api(""), catalog.HealthPassing))
	who := newIdentity(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wrongKind, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p384)
	if err != nil {
		t.Fatal(err)
	}
	svc := func(name string) string { return spiffe.Service(trustDomain, "default", name).String() }
	for _, row := range []struct {
		name   string
		client meshpb.MeshClient
		id     string
		csr    []byte
		code   codes.Code
		reason meshpb.Reason
	}{
		{"its own service", a, svc("web"), who.csr, codes.OK, ""},
		{"the other's service", a, svc("api"), who.csr, codes.PermissionDenied, meshpb.ReasonNotPermitted},
		{"permitted, not registered", a, svc("batch"), who.csr, codes.PermissionDenied, meshpb.ReasonNotRegistered},
		{"another trust domain", a, spiffe.Service("other.test", "default", "web").String(), who.csr, codes.PermissionDenied, meshpb.ReasonNotPermitted},
		{"itself", a, spiffe.Node(trustDomain, "vm-a").String(), who.csr, codes.OK, ""},
		{"another node", a, spiffe.Node(trustDomain, "vm-b").String(), who.csr, codes.PermissionDenied, meshpb.ReasonNotPermitted},
		{"a server", a, spiffe.Server(trustDomain, "server-1").String(), who.csr, codes.PermissionDenied, meshpb.ReasonNotPermitted},
		{"nobody", a, "", who.csr, codes.InvalidArgument, meshpb.ReasonBadRequest},
		{"a wrong key", a, svc("web"), wrongKind, codes.InvalidArgument, meshpb.ReasonBadRequest},
		{"no key", a, svc("web"), nil, codes.InvalidArgument, meshpb.ReasonBadRequest},
		{"without a certificate", c.dial(nil), svc("web"), who.csr, codes.Unauthenticated, meshpb.ReasonNoIdentity},
	} {
		res, err := row.client.Sign(t.Context(), &meshpb.SignRequest{Id: row.id, Csr: row.csr})
		if reason, _ := meshpb.ReasonOf(err); status.Code(err) != row.code || reason != row.reason {
			t.Errorf("%s: %v, want %v (%s)", row.name, err, row.code, row.reason)
		}
		if err == nil && who.leaf(t, res.GetChain()).ID().String() != row.id {
			t.Errorf("%s: certificate for %v", row.name, who.leaf(t, res.GetChain()).ID())
		}
	}
	// Renewed: the new certificate and the one that asked for it are both good.
	res, err := a.Sign(t.Context(), &meshpb.SignRequest{Id: leafA.ID().String(), Csr: who.csr})
	if err != nil {
		t.Fatal(err)
	}
	for _, client := range []meshpb.MeshClient{a, c.dial(who.leaf(t, res.GetChain()))} {
		if _, err := client.Sign(t.Context(), &meshpb.SignRequest{Id: svc("web"), Csr: who.csr}); err != nil {
			t.Errorf("after the renewal: %v", err)
		}
	}
	// A service's certificate is none of a node's.
	res, err = a.Sign(t.Context(), &meshpb.SignRequest{Id: svc("web"), Csr: who.csr})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.dial(who.leaf(t, res.GetChain())).Register(t.Context(), &meshpb.RegisterRequest{})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a service registers: %v", err)
	}
	// So is one that a foreign CA made for our node.
	foreign := newIdentity(t)
	chain, err := newAuthority(t).Sign(t.Context(), ca.SignRequest{PublicKey: foreign.key.Public(), ID: leafA.ID()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.dial(foreign.leaf(t, chain.DER())).Register(t.Context(), &meshpb.RegisterRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a foreign CA's certificate: %v", err)
	}
}

func TestSignRate(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{SignRate: 0.1}) // and so a burst of two
	c.listen()
	client := c.dial(c.join("vm-a", "web"))
	register(t, client, definition(t, "vm-a", web(""), catalog.HealthPassing))
	csr := newIdentity(t).csr
	var last error
	for range 3 {
		_, last = client.Sign(t.Context(), &meshpb.SignRequest{Id: spiffe.Service(trustDomain, "default", "web").String(), Csr: csr})
	}
	if reason, _ := meshpb.ReasonOf(last); reason != meshpb.ReasonTooMany {
		t.Errorf("the third of two: %v", last)
	}
}

func TestLeave(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	client := c.dial(c.join("vm-a", "web"))
	register(t, client, definition(t, "vm-a", web(""), catalog.HealthPassing))
	if _, err := client.Leave(t.Context(), &meshpb.LeaveRequest{}); err != nil {
		t.Fatal(err)
	}
	if n := len(c.onA()); n != 0 || state.Leases.Len(c.state.Snapshot()) != 0 {
		t.Errorf("%d instances, %d leases stay", n, state.Leases.Len(c.state.Snapshot()))
	}
	register(t, client, definition(t, "vm-a", web(""), catalog.HealthPassing)) // it may come back
}

// Nothing brings back the instances of a node that has left but an agent that connects
// again: not what had been sent before and comes late, nor what is under way meanwhile.
func TestLateRegistration(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leaf := c.join("vm-a", "web")
	client := c.dial(leaf)
	set := func(session string, instances int) *meshpb.RegisterRequest {
		req := &meshpb.RegisterRequest{Session: session}
		for i := range instances {
			req.Registrations = append(req.Registrations, definition(t, "vm-a", web(fmt.Sprintf("web-%d", i)), catalog.HealthPassing))
		}
		return req
	}
	try := func(what string, req *meshpb.RegisterRequest, want meshpb.Reason, instances int) {
		t.Helper()
		_, err := client.Register(t.Context(), req)
		if reason, _ := meshpb.ReasonOf(err); reason != want || (err == nil) != (want == "") {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
		if got := len(c.onA()); got != instances {
			t.Errorf("%s: %d instances, want %d", what, got, instances)
		}
	}
	try("no stream yet", set("s1", 1), meshpb.ReasonLeft, 0)
	c.connect(leaf, "s1")
	try("connected", set("s1", 2), "", 2)
	for range 20 {
		// As many as take several transactions, so that the node leaves between two.
		under := make(chan error, 1)
		go func() {
			_, err := client.Register(t.Context(), set("s1", 200))
			under <- err
		}()
		if _, err := client.Leave(t.Context(), &meshpb.LeaveRequest{}); err != nil {
			t.Fatal(err)
		}
		if err := <-under; err != nil {
			if reason, _ := meshpb.ReasonOf(err); reason != meshpb.ReasonLeft {
				t.Errorf("a registration while the node leaves: %v", err)
			}
		}
		if got := c.onA(); len(got) != 0 {
			t.Errorf("%d instances of a node that has left", len(got))
		}
		try("late", set("s1", 1), meshpb.ReasonLeft, 0)
		try("late and empty", set("s1", 0), meshpb.ReasonLeft, 0)
		c.connect(leaf, "s1") // back
	}
	c.connect(leaf, "s2")
	try("restarted", set("s2", 3), "", 3)
	try("of the agent before", set("s1", 5), meshpb.ReasonSuperseded, 3)
	try("nothing, of the agent before", set("s1", 0), meshpb.ReasonSuperseded, 3)
}

// Whatever an agent sends, nothing is registered for another node or a service that is
// not its own, and what is stored can be read.
func FuzzRegister(f *testing.F) {
	c := start(f, rpc.Config{})
	leaf := c.join("vm-a", "web")
	good := definition(f, "vm-a", web(""), catalog.HealthPassing)
	f.Add(good.GetService(), good.GetInstance(), good.GetStatus())
	f.Add([]byte(`{"name":"web"}`), []byte(`{"service":"web","id":"/","node":"vm-a"}`), []byte(`{}`))
	f.Add([]byte(`{"name":"api"}`), []byte(`{"service":"api","id":"x","node":"vm-b","Node":"vm-a"}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, service, instance, health []byte) {
		res := register(t, direct{c, leaf}, &meshpb.Registration{Service: service, Instance: instance, Status: health})
		snapshot := c.state.Snapshot()
		registered := 0
		for key, rec := range state.Instances.All(snapshot) {
			registered++
			if key.Node != "vm-a" || key.Service.Name != "web" || rec.Err != nil || rec.Value.Key() != key {
				t.Errorf("registered %v as %+v: %v", key, rec.Value, rec.Err)
			}
		}
		if registered+len(res.GetRefusals()) != 1 {
			t.Errorf("%d registered, %d refused", registered, len(res.GetRefusals()))
		}
		for p := range snapshot.Problems() {
			t.Errorf("stored, and can't be read: %v", p)
		}
	})
}
