package server

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/meshd/meshd/server/peer"
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

// TestComparison holds states against each other: "=" is this server's, "!" another
// one, "?" a server that is elsewhere in the log, "x" one that does not answer. The
// first of the others leads, unless this one does.
func TestComparison(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		others string
		leads  bool
		apart  int
		err    error
	}{
		{"==", false, 0, nil},
		{"==", true, 0, nil},
		{"=!", false, 0, nil}, // the leader's is this one's: the third one learns it by itself
		{"=!", true, 1, nil},
		{"!!", true, 2, nil},
		{"!=", false, 0, errApart},
		{"?!", false, 0, nil},
		{"x!", false, 0, nil},
		{"x?", true, 0, nil},
	} {
		compared := comparison{at: 7, own: "aaaaaaaaaaaaaaaaaaaa", leads: c.leads}
		for i, word := range c.others {
			answer := peer.Answer[peer.Status]{Server: peer.Server{ID: fmt.Sprintf("s%d.0123abcd", i), Leader: i == 0 && !c.leads}}
			answer.Value.HashAt, answer.Value.Hash = 7, compared.own
			switch word {
			case '!':
				answer.Value.Hash = "bbbbbbbbbbbbbbbbbbbb"
			case '?':
				answer.Value.HashAt, answer.Value.Hash = 6, "cccccccccccccccccccc"
			case 'x':
				answer.Value, answer.Err = peer.Status{}, errors.New("it did not answer")
			}
			compared.others = append(compared.others, answer)
		}
		apart, err := compared.result()
		if len(apart) != c.apart || !errors.Is(err, c.err) {
			t.Errorf("%q, leads %v: %v, %v; want %d, %v", c.others, c.leads, apart, err, c.apart, c.err)
		}
	}
}
