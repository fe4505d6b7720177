package server

import (
	"fmt"
	"testing"
	"time"

	"github.com/meshd/meshd/server/store/raftstore"
)

// TestNextStep decides about clusters that are written as one word per server:
// name, then + for a voter or - for a non-voter, then how many seconds ago it
// answered (the first is this one), then "s" if it was steady for long enough.
func TestNextStep(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		servers  []string
		nonVoter string
		want     string
	}{
		{"all is well", []string{"a+0", "b+1", "c+1"}, "", ""},
		{"a new one has caught up", []string{"a+0", "b+1", "c+1", "d-0s"}, "", "promote d"},
		{"a new one has not", []string{"a+0", "b+1", "c+1", "d-0"}, "", ""},
		{"one that is to have no vote", []string{"a+0", "b+1", "c+1", "d-0s"}, "d", ""},
		{"one that is to have none any more", []string{"a+0", "b+1", "c+1", "d+0", "e+1"}, "e", "demote e"},
		{"the leader is not demoted by itself", []string{"a+0", "b+1", "c+1"}, "a", ""},
		{"one of three is dead", []string{"a+0", "b+1", "c+601"}, "", ""},
		{"one of three is dead, its successor has a vote", []string{"a+0", "b+1", "c+601", "d+1"}, "", "remove c"},
		{"one of three is dead, its successor has none yet", []string{"a+0", "b+1", "c+601", "d-1s"}, "", "promote d"},
		{"one of five is dead", []string{"a+0", "b+1", "c+1", "d+1", "e+601"}, "", "remove e"},
		{"two of five are dead", []string{"a+0", "b+1", "c+1", "d+700", "e+601"}, "", "remove d"},
		{"one of five restarts", []string{"a+0", "b+1", "c+1", "d+1", "e+599"}, "", ""},
		{"most are silent", []string{"a+0", "b+1", "c+700", "d+700", "e+700"}, "", ""},
		{"a dead one without a vote", []string{"a+0", "b+1", "c+1", "d-601"}, "", "remove d"},
		{"no more than seven votes", []string{"a+0", "b+1", "c+1", "d+1", "e+1", "f+1", "g+1", "h-0s"}, "", ""},
		{"a demotion that would leave too few", []string{"a+0", "b+1", "c+30"}, "b", ""},
	} {
		now := time.Now()
		s := situation{now: now, seen: map[string]observed{}, nonVoter: map[string]bool{c.nonVoter: true}, deadAfter: 10 * time.Minute, mostVoters: maxExpected}
		for i, word := range c.servers {
			var silent int
			var steady string
			name, vote := word[:1], word[1:2]
			if _, err := fmt.Sscanf(word[2:]+" ", "%d%s", &silent, &steady); err != nil && silent == 0 && word[2] != '0' {
				t.Fatalf("%s: %s: %v", c.name, word, err)
			}
			id := name + ".0123abcd"
			s.servers = append(s.servers, raftstore.Server{ID: id, Voter: vote == "+", Self: i == 0, Leader: i == 0})
			seen := observed{answered: now.Add(-time.Duration(silent) * time.Second)}
			if steady == "s" {
				seen.steady = now.Add(-promoteAfter)
			}
			s.seen[id] = seen
		}
		have := ""
		if next, ok := s.nextStep(); ok {
			have = next.act.String() + " " + nameOf(next.server.ID)
		}
		if have != c.want {
			t.Errorf("%s: %q, want %q", c.name, have, c.want)
		}
	}
}
