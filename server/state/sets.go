package state

import (
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/meshd/meshd/catalog"
)

// Set is a group of resources that are applied together, so that what is taken
// out of their files can be told from what others made. Its members are in
// SetMembers.
type Set struct {
	Name string `json:"name"`
	// Updated is when its last change was applied, By who did.
	Updated time.Time `json:"updated"`
	By      string    `json:"by"`
}

// Validate returns the problems of the record.
func (s Set) Validate() error {
	var p catalog.Problems
	if err := catalog.CheckLabel(s.Name); err != nil {
		p.Add("name", "%v", err)
	}
	return p.Err()
}

// A Member names a resource: its kind, and the parts of its name with slashes
// between them.
type Member struct {
	Kind, Name string
}

// Membership says which set a resource belongs to. There is one record per
// resource, so that it belongs to one set at most, and a set may have any size.
type Membership struct {
	Set string `json:"set"`
}

const indexSet = "\x00set"

// MembersOf yields the members of a set in the order of their kinds and names.
func (s *Snapshot) MembersOf(set string) iter.Seq[Member] {
	return func(yield func(Member) bool) {
		for m := range SetMembers.under(s, joinPath(indexSet, set)+"/") {
			if !yield(m) {
				return
			}
		}
	}
}

func encodeMember(m Member) []string { return append([]string{m.Kind}, strings.Split(m.Name, "/")...) }

func decodeMember(s []string) (Member, error) {
	if len(s) < 2 {
		return Member{}, fmt.Errorf("%w: %w: %d, want 2 or more", errKey, errSegments, len(s))
	}
	return Member{Kind: s[0], Name: strings.Join(s[1:], "/")}, nil
}
