package server_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/meshpb"
)

// TestAuditOfAgents: who was admitted, what was signed for whom, and who was
// refused, is in the audit log.
func TestAuditOfAgents(t *testing.T) {
	t.Parallel()
	i := mustRun(t, server.Config{DataDir: privateDir(t)})
	secret := i.joinToken(t, "vm-a", `"web"`)
	if _, err := i.join(t, "vm-b", secret); err == nil {
		t.Fatal("another node than the token's joined")
	}
	if _, err := i.join(t, "not a name", secret); err == nil {
		t.Fatal("a node without a valid name joined")
	}
	leaf, err := i.join(t, "vm-a", secret)
	if err != nil {
		t.Fatal(err)
	}
	mesh := i.mesh(t, leaf)
	key, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := mesh.Sign(t.Context(), &meshpb.SignRequest{Id: spiffe.Node(trustDomain, "vm-a").String(), Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.ParseChain(answer.GetChain())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mesh.Sign(t.Context(), &meshpb.SignRequest{Id: spiffe.Service(trustDomain, "default", "api").String(), Csr: csr}); err == nil {
		t.Fatal("a service that the node may not run got a certificate")
	}
	if _, err := mesh.Leave(t.Context(), &meshpb.LeaveRequest{}); err != nil {
		t.Fatal(err)
	}

	api, err := client.New(client.Config{Address: "unix://" + i.AdminSocket()})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"anonymous join vm-b denied TOKEN_OTHER_NODE ",
		"anonymous join  failed BAD_REQUEST ",
		fmt.Sprintf("anonymous join vm-a allowed  %s serial %x", spiffe.Node(trustDomain, "vm-a"), leaf.Chain()[0].SerialNumber),
		fmt.Sprintf("node:vm-a sign vm-a allowed  %s serial %x", spiffe.Node(trustDomain, "vm-a"), chain[0].SerialNumber),
		"node:vm-a sign api denied NOT_PERMITTED ",
		"node:vm-a leave vm-a allowed  ",
	}
	var got []string
	until(t, "the records", func() bool {
		log, err := api.Audit(t.Context(), client.AuditQuery{})
		if err != nil {
			t.Fatal(err)
		}
		got = got[:0]
		for _, r := range log.Records {
			if r.Method != "gRPC" {
				continue
			}
			if !strings.HasPrefix(r.Route, "/") || r.Remote != "127.0.0.1" || r.Verb != "write" || r.Status != 0 {
				t.Errorf("%+v", r)
			}
			names := make([]string, len(r.Changes))
			for c := range r.Changes {
				names[c] = r.Changes[c].Name
			}
			got = append(got, fmt.Sprintf("%s %s %s %s %s %s", r.Who, r.Resource, r.Name, r.Outcome, r.Code, strings.Join(names, ",")))
		}
		return slices.Equal(got, want) || len(got) > len(want)
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if code := call(t, i.local(), http.MethodGet, "http://x/v1/audit?kind=join&outcome=denied", "", "", nil); code != http.StatusOK {
		t.Errorf("select by kind: status %d", code)
	}
}
