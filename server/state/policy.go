package state

import (
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// anyName stands for every namespace or service in the key of an intention.
const anyName = "*"

// IntentionsFor yields the intentions that may apply to a destination: its own,
// those of its namespace, those of everything. Records that can't be read are
// among them; see Policy for what follows from one.
func (s *Snapshot) IntentionsFor(destination catalog.Name) iter.Seq2[intentions.Key, Record[intentions.Intention]] {
	return func(yield func(intentions.Key, Record[intentions.Intention]) bool) {
		for _, prefix := range intentionPrefixes(destination) {
			for key, record := range Intentions.under(s, prefix) {
				if !yield(key, record) {
					return
				}
			}
		}
	}
}

// Policy compiles the intentions of a destination. If one of them can't be read,
// or they do not compile, it returns an error and no policy, and a nil policy
// denies everything: what can't be understood must not vanish.
func (s *Snapshot) Policy(trustDomain string, destination catalog.Name) (*intentions.Policy, error) {
	var unreadable error
	for p := range s.UnreadableIntentions(destination) {
		unreadable = errors.Join(unreadable, fmt.Errorf("%s: %w", p.Key, p.Err))
	}
	if unreadable != nil {
		return nil, fmt.Errorf("intentions of %s can't be read, so that all is denied: %w", destination, unreadable)
	}
	var all []intentions.Intention
	for _, record := range s.IntentionsFor(destination) {
		all = append(all, record.Value)
	}
	policy, err := intentions.Compile(trustDomain, destination, all)
	if err != nil {
		return nil, fmt.Errorf("intentions of %s do not compile, so that all is denied: %w", destination, err)
	}
	return policy, nil
}

// UnreadableIntentions yields the problems of intentions that may apply to a
// destination. One of which even the key can't be read is among them, and not
// among IntentionsFor, as long as its destination can.
func (s *Snapshot) UnreadableIntentions(destination catalog.Name) iter.Seq[Problem] {
	return func(yield func(Problem) bool) {
		for _, prefix := range intentionPrefixes(destination) {
			for p := range s.problems(prefix) {
				if !yield(p) {
					return
				}
			}
		}
	}
}

func intentionPrefixes(d catalog.Name) []string {
	return []string{
		joinPath(Intentions.prefix()+encodeSegment(d.Namespace), d.Name) + "/",
		joinPath(Intentions.prefix()+encodeSegment(d.Namespace), anyName) + "/",
		joinPath(Intentions.prefix()+encodeSegment(anyName), anyName) + "/",
	}
}

// KeyText returns the text of an intention's key, one word per key: how it is
// named on the wire and in paths. ParseIntentionKey reads it.
func KeyText(key intentions.Key) string {
	return strings.TrimPrefix(Intentions.Path(key), Intentions.prefix())
}

// ParseKeyText reads what KeyText wrote.
func ParseKeyText(text string) (intentions.Key, error) {
	segments, err := splitPath(text)
	if err != nil {
		return intentions.Key{}, err
	}
	return decodeIntention(segments)
}
