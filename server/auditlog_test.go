package server_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/server/client"
)

// TestAuditOfACluster: any server shows what all have recorded, and what comes.
func TestAuditOfACluster(t *testing.T) {
	t.Parallel()
	c := newTrio(t)
	for i := range c.dirs {
		c.start(t, i)
	}
	for i := range c.dirs {
		c.await(t, i)
	}
	put := func(through int, name string) {
		t.Helper()
		until(t, "a write", func() bool {
			return call(t, c.running[through].local(), http.MethodPut, "http://x/v1/nodes/"+name, "", fmt.Sprintf(`{"name":%q}`, name), nil) == http.StatusOK
		})
	}
	for i := range c.dirs {
		put(i, fmt.Sprintf("vm-%d", i))
	}
	api, err := client.New(client.Config{Address: "unix://" + c.running[0].AdminSocket()})
	if err != nil {
		t.Fatal(err)
	}
	names := func(q client.AuditQuery) (out []string, silent []string) {
		t.Helper()
		q.Kind, q.Outcome = "node", "allowed"
		answer, err := api.Audit(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range answer.Records {
			out = append(out, r.Server+" "+r.Name)
		}
		return out, answer.Silent
	}
	for name, row := range map[string]struct {
		query client.AuditQuery
		want  []string
	}{
		"of all":     {client.AuditQuery{}, []string{"server-1 vm-0", "server-2 vm-1", "server-3 vm-2"}},
		"the newest": {client.AuditQuery{Limit: 1}, []string{"server-3 vm-2"}},
		"of one":     {client.AuditQuery{Server: "server-2"}, []string{"server-2 vm-1"}},
	} {
		until(t, name, func() bool { // a record is written a moment after the answer
			got, silent := names(row.query)
			return slices.Equal(got, row.want) && len(silent) == 0
		})
	}
	if _, err := api.Audit(t.Context(), client.AuditQuery{Server: "server-9"}); client.CodeOf(err) != client.CodeNotFound {
		t.Errorf("no such server: %v", err)
	}
	if _, err := api.Audit(t.Context(), client.AuditQuery{After: 1}); client.CodeOf(err) != client.CodeInvalid {
		t.Errorf("after, of no server: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen []string
	for answer, err := range api.FollowAudit(ctx, client.AuditQuery{Kind: "node", Limit: 1}) {
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range answer.Records {
			if seen = append(seen, r.Server+" "+r.Name); len(seen) <= 3 {
				put(len(seen)-1, fmt.Sprintf("vm-later-%d", len(seen)-1))
			}
		}
		if len(seen) == 4 {
			break
		}
	}
	if want := []string{"server-3 vm-2", "server-1 vm-later-0", "server-2 vm-later-1", "server-3 vm-later-2"}; !slices.Equal(seen, want) {
		t.Errorf("followed %v, want %v", seen, want)
	}

	c.running[2].stop()
	until(t, "what is missing is told", func() bool {
		_, silent := names(client.AuditQuery{})
		return len(silent) == 1 && strings.HasPrefix(silent[0], "server-3: ")
	})
}
