package server

import (
	"fmt"
	"strings"
	"time"

	"github.com/meshd/meshd/server/store/raftstore"
)

const (
	// stewardInterval is how often the leader looks after the cluster.
	stewardInterval = time.Second
	// promoteAfter is for how long a new server must answer, and be close behind the
	// leader, before it gets a vote.
	promoteAfter = 5 * time.Second
	// closeBehind is how many entries of the log that may be.
	closeBehind = 1000
	// aliveWithin is how long ago a server that lives has answered.
	aliveWithin = 5 * time.Second
	// keepVoters is how many voters must remain when a dead one is removed.
	keepVoters = 3
)

// observed is what the leader has seen of one server since it leads.
type observed struct {
	answered time.Time // last; the begin of the term, if never
	steady   time.Time // since when it has answered and was close behind; zero: it was not
}

// step is one change of the cluster that the leader makes by itself.
type step struct {
	server raftstore.Server
	act    act
	why    string
}

type act uint8

const (
	actPromote act = iota + 1
	actDemote
	actRemove
)

// String returns the verb.
func (a act) String() string {
	switch a {
	case actPromote:
		return "promote"
	case actDemote:
		return "demote"
	case actRemove:
		return "remove"
	default:
		return "leave"
	}
}

// situation is what nextStep decides from.
type situation struct {
	now     time.Time
	servers []raftstore.Server
	seen    map[string]observed // by ID
	// nonVoter tells which names are to have no vote.
	nonVoter   map[string]bool
	deadAfter  time.Duration
	mostVoters int
}

// nextStep returns what to do next: one step at a time, and none that would let
// the cluster depend on servers that do not answer.
func (s situation) nextStep() (step, bool) {
	for _, server := range s.servers {
		if !server.Voter && !s.nonVoter[nameOf(server.ID)] && s.steady(server) && s.voters() < s.mostVoters {
			return step{server, actPromote, "it has caught up"}, true
		}
	}
	for _, server := range s.servers {
		if server.Voter && !server.Self && s.nonVoter[nameOf(server.ID)] && s.safeWithout(server) {
			return step{server, actDemote, "its configuration says non_voter"}, true
		}
	}
	for _, server := range s.servers {
		if silent := s.silent(server); !server.Self && silent > s.deadAfter && (!server.Voter || s.alive() >= keepVoters && s.safeWithout(server)) {
			return step{server, actRemove, fmt.Sprintf("it has not answered for %s", silent.Round(time.Second))}, true
		}
	}
	return step{}, false
}

func (s situation) silent(server raftstore.Server) time.Duration {
	if server.Self {
		return 0
	}
	return s.now.Sub(s.seen[server.ID].answered)
}

func (s situation) steady(server raftstore.Server) bool {
	since := s.seen[server.ID].steady
	return !since.IsZero() && s.now.Sub(since) >= promoteAfter
}

func (s situation) voters() int {
	n := 0
	for _, server := range s.servers {
		if server.Voter {
			n++
		}
	}
	return n
}

// alive counts the voters that answer.
func (s situation) alive() int {
	n := 0
	for _, server := range s.servers {
		if server.Voter && s.silent(server) <= aliveWithin {
			n++
		}
	}
	return n
}

// safeWithout reports whether those voters that answer are a majority of the
// voters without server.
func (s situation) safeWithout(server raftstore.Server) bool {
	alive := s.alive()
	if s.silent(server) <= aliveWithin {
		alive--
	}
	return 2*alive > s.voters()-1
}

// nameOf cuts a server's name out of the ID of a member.
func nameOf(id string) string {
	name, _, _ := strings.Cut(id, ".")
	return name
}
