package api_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/client"
)

// standInCluster is a stand-in for the servers.
type standInCluster struct {
	leader string
	others []client.Member
	asked  int
	fail   error
}

// Members tells of s1, and of what a test has added.
func (s *standInCluster) Members(_ context.Context, ask bool) []client.Member {
	if ask {
		s.asked++
	}
	return append([]client.Member{{Name: "s1", ID: "s1.00000001", Voter: true, Leader: s.leader == "s1"}}, s.others...)
}

// Transfer makes another server the leader.
func (s *standInCluster) Transfer(_ context.Context, name string) (string, error) {
	if s.fail != nil {
		return "", s.fail
	}
	s.leader = name
	return name, nil
}

// Remove takes a server out.
func (s *standInCluster) Remove(_ context.Context, name string) (client.Member, error) {
	i := slices.IndexFunc(s.others, func(m client.Member) bool { return m.Name == name })
	if i < 0 {
		return client.Member{}, &client.Error{Code: client.CodeNotFound, Message: "no such server"}
	}
	removed := s.others[i]
	s.others = slices.Delete(s.others, i, i+1)
	return removed, nil
}

func TestCluster(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.servers.others = []client.Member{{Name: "s2", ID: "s2.00000001", Voter: true, Problem: "it does not answer"}}
	w.fleet.held = []string{"vm-a"}
	var got client.Members
	w.do(t, http.MethodGet, "/v1/members", "", http.StatusOK, &got)
	want := client.Members{
		Members: []client.Member{{Name: "s1", ID: "s1.00000001", Voter: true, Leader: true}, w.servers.others[0]}, Held: []string{"vm-a"},
	}
	if diff := cmp.Diff(want, got); diff != "" || w.servers.asked != 1 {
		t.Errorf("members (-want +got), asked %d times:\n%s", w.servers.asked, diff)
	}
	var status client.Status
	w.do(t, http.MethodGet, "/v1/status", "", http.StatusOK, &status)
	if len(status.Members) != 2 || w.servers.asked != 1 {
		t.Errorf("status has %v; it asks nobody, and asked %d times", status.Members, w.servers.asked-1)
	}

	w.accounts()
	var moved client.Transferred
	w.do(t, http.MethodPost, "/v1/operator/raft/transfer", `{"to":"s2"}`, http.StatusOK, &moved)
	if moved.Leader != "s2" {
		t.Errorf("%+v leads", moved)
	}
	w.do(t, http.MethodPost, "/v1/operator/raft/transfer", "", http.StatusOK, nil)
	w.servers.fail = &client.Error{Code: client.CodeConflict, Message: "no other server can lead"}
	if status, body := call(t, http.MethodPost, w.url+"/v1/operator/raft/transfer", w.token, "{}"); status != http.StatusConflict {
		t.Errorf("an only server: %d %s", status, body)
	}
	if status, body := call(t, http.MethodPost, w.url+"/v1/operator/raft/transfer", w.token, `{"To":"s2"}`); status != http.StatusBadRequest || !strings.Contains(body, "To") {
		t.Errorf("an unknown member: %d %s", status, body)
	}
	var removed client.Member
	w.do(t, http.MethodDelete, "/v1/operator/raft/servers/s2", "", http.StatusOK, &removed)
	if removed.ID != "s2.00000001" {
		t.Errorf("removed %+v", removed)
	}
	if status, body := call(t, http.MethodDelete, w.url+"/v1/operator/raft/servers/s2", w.token, ""); status != http.StatusNotFound {
		t.Errorf("twice: %d %s", status, body)
	}
	if accounts := w.accounts(); len(accounts) != 6 {
		t.Errorf("%d of 6 changes stand in the audit log: %+v", len(accounts), accounts)
	}
}
