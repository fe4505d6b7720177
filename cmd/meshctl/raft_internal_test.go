package main

import (
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

// TestServersInCheck has servers with all that can be wrong with them.
func TestServersInCheck(t *testing.T) {
	t.Parallel()
	var r report
	r.members("srv-1", []client.Member{
		{Name: "srv-1", Version: "1.0", Voter: true, Leader: true, State: client.StateEqual},
		{Name: "srv-2", Version: "1.0", Voter: true, State: client.StateEqual},
		{Name: "srv-3", Voter: true, Problem: "connection refused"},
		{Name: "srv-4", Voter: true, State: client.StateDifferent},
		{Name: "srv-5", Voter: true, Contact: catalog.Duration(5 * time.Second)},
		{Name: "srv-6", Version: "1.1"},
	})
	want := []string{
		client.FactOK + " server srv-2 1.0",
		client.FactFail + " server srv-3 does not answer: connection refused →",
		client.FactFail + " server srv-4 has another state than the leader →",
		client.FactFail + " server srv-5 has had no leader for 5s →",
		client.FactOK + " server srv-6 1.1, has no vote",
	}
	if !begins(r, want) || !r.Failed {
		t.Errorf("check says\n%s", &r)
	}
	r = report{}
	r.members("srv-1", []client.Member{{Name: "srv-1", Voter: true}})
	if !begins(r, []string{client.FactFail + " no server leads"}) {
		t.Errorf("without a leader check says\n%s", &r)
	}
	r = report{}
	if r.members("srv-1", []client.Member{{Name: "srv-1", Voter: true, Leader: true}}); len(r.Facts) != 0 {
		t.Errorf("of a lone server check says\n%s", &r)
	}
}

func begins(r report, want []string) bool {
	if len(r.Facts) != len(want) {
		return false
	}
	for i, f := range r.Facts {
		if !strings.HasPrefix(f.Mark+" "+f.Text, want[i]) {
			return false
		}
	}
	return true
}
