package api_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
)

// TestWhatIsAudited: each write, each denial and each read of a secret, and
// nothing else.
func TestWhatIsAudited(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const node, intention = "/v1/nodes/vm-a", "/v1/intentions/default/api/default/web"
	many := `{"resources":[{"kind":"node","spec":{"name":"vm-a"}},{"kind":"node","spec":{"name":"vm-b"}}]}`
	for _, row := range []struct {
		name, method, path, token, body string
		want                            *api.AuditRecord
	}{
		{"a read", "GET", "/v1/nodes", w.token, "", nil},
		{"a public read", "GET", "/v1/healthz", "", "", nil},
		{"a read of what is not there", "GET", node, w.token, "", nil},
		{"a write", "PUT", node, w.token, `{"name":"vm-a"}`, &api.AuditRecord{
			Verb: acl.Write, Resource: acl.Node, Name: "vm-a", Method: "PUT", Route: "/v1/nodes/{name}", Outcome: api.OutcomeAllowed, Status: 200,
			Changes: []api.AuditChange{{Kind: client.KindNode, Name: "vm-a", Change: "created"}},
		}},
		{"apply changes one of two", "POST", "/v1/apply", w.token, many, &api.AuditRecord{
			Verb: acl.Write, Resource: acl.Each, Method: "POST", Route: "/v1/apply", Outcome: api.OutcomeAllowed, Status: 200,
			Changes: []api.AuditChange{{Kind: client.KindNode, Name: "vm-b", Change: "created"}},
		}},
		{"a write that conflicts", "PUT", node + "?revision=0", w.token, `{"name":"vm-a","services":["x"]}`, &api.AuditRecord{
			Verb: acl.Write, Resource: acl.Node, Name: "vm-a", Method: "PUT", Route: "/v1/nodes/{name}", Outcome: api.OutcomeFailed, Status: 409, Code: client.CodeConflict,
		}},
		{"a denied write", "PUT", intention, "", `{}`, &api.AuditRecord{
			Who: "anonymous", Verb: acl.Write, Resource: acl.Intention, Namespace: "default", Name: "api", Method: "PUT",
			Route: "/v1/intentions/{namespace}/{destination}/{source_namespace}/{source}", Outcome: api.OutcomeDenied, Status: 401, Code: client.CodeUnauthorized,
		}},
		{"an unknown token", "GET", "/v1/nodes", "mesht_wrong-and-secret", "", &api.AuditRecord{
			Who: "anonymous", Verb: acl.Read, Resource: acl.Node, Method: "GET", Route: "/v1/nodes", Outcome: api.OutcomeDenied, Status: 401, Code: client.CodeUnauthorized,
		}},
		{"the whole state", "GET", "/v1/snapshot", w.token, "", &api.AuditRecord{
			Verb: acl.Read, Resource: acl.Snapshot, Method: "GET", Route: "/v1/snapshot", Outcome: api.OutcomeAllowed, Status: 200,
		}},
		{"a join token", "POST", "/v1/join-tokens", w.token, `{"node":"vm-c"}`, &api.AuditRecord{
			Verb: acl.Write, Resource: acl.JoinTokens, Name: "vm-c", Method: "POST", Route: "/v1/join-tokens", Outcome: api.OutcomeAllowed, Status: 200,
		}},
	} {
		status, body := call(t, row.method, w.url+row.path, row.token, row.body)
		var want []api.AuditRecord
		if row.want != nil {
			if row.want.Who == "" {
				row.want.Who, row.want.Title = "token:"+w.accessor, "test"
			}
			want = []api.AuditRecord{*row.want}
		}
		got := w.accounts()
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(api.AuditRecord{}, "Time", "RequestID", "Remote", "Revision")); diff != "" {
			t.Errorf("%s (%d %s): -want +got\n%s", row.name, status, body, diff)
		}
		for _, r := range got {
			committed := r.Outcome == api.OutcomeAllowed && r.Verb == acl.Write
			if r.Time.IsZero() || len(r.RequestID) != 16 || r.Remote != "127.0.0.1" || committed && r.Revision == 0 || r.Outcome != api.OutcomeAllowed && r.Revision != 0 {
				t.Errorf("%s: %+v", row.name, r)
			}
		}
	}
}
