// Package view holds what the servers told this host: topics of the catalog,
// newest values only.
//
// One stream to one server brings batches. A batch is applied whole, as a new
// immutable Snapshot; a reader takes the newest and never sees a part. Within
// one generation of the store nothing ever goes back: a server that lags
// behind the one before it is ignored until it has caught up. A new generation
// (a restore, a migration) replaces what is held, topic by topic as the server
// sends them.
//
// What is held is kept on disk, so that a host serves on with its last policy
// through a restart without any server. Age says how old that word is.
package view

import (
	"iter"
	"maps"
	"slices"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

// The kinds of topics; server/meshpb/mesh.proto says what each holds.
const (
	KindRoots      = "roots"
	KindNode       = "node"
	KindIntentions = "intentions"
	KindUpstream   = "upstream"
	KindServers    = "servers"
)

// Topic names a slice of the catalog. It is comparable.
type Topic struct {
	Kind   string `json:"kind"`
	Name   string `json:"name,omitempty"`
	Source string `json:"source,omitempty"`
}

// Roots is the topic of the trusted roots.
func Roots() Topic { return Topic{Kind: KindRoots} }

// Node is the topic of the caller's own node.
func Node() Topic { return Topic{Kind: KindNode} }

// Servers is the topic of where the servers are.
func Servers() Topic { return Topic{Kind: KindServers} }

// Intentions is the topic of what may reach a local service.
func Intentions(destination catalog.Name) Topic {
	return Topic{Kind: KindIntentions, Name: destination.String()}
}

// Upstream is the topic of a service that a local one calls.
func Upstream(source, destination catalog.Name) Topic {
	return Topic{Kind: KindUpstream, Name: destination.String(), Source: source.String()}
}

func (t Topic) wire() *meshpb.Topic {
	return &meshpb.Topic{Kind: t.Kind, Name: t.Name, Source: t.Source}
}

func topicOf(t *meshpb.Topic) Topic {
	return Topic{Kind: t.GetKind(), Name: t.GetName(), Source: t.GetSource()}
}

// Snapshot is what is held at one moment. It is immutable; the zero value and
// nil hold nothing.
type Snapshot struct {
	position catalog.Position
	topics   map[Topic]*held
}

// held is one topic's content. It is never changed once a Snapshot has it.
type held struct {
	position catalog.Position
	items    map[string]item
}

type item struct {
	json     []byte
	revision uint64
}

// NewSnapshot returns a snapshot with the given content, which it takes over.
func NewSnapshot(position catalog.Position, content map[Topic]map[string][]byte) *Snapshot {
	s := &Snapshot{position: position, topics: make(map[Topic]*held, len(content))}
	for topic, items := range content {
		h := &held{position: position, items: make(map[string]item, len(items))}
		for key, data := range items {
			h.items[key] = item{json: data, revision: position.Revision}
		}
		s.topics[topic] = h
	}
	return s
}

// Position is the newest that the server told: all held topics are at least as
// new, or a newer value of them is not known to exist.
func (s *Snapshot) Position() catalog.Position {
	if s == nil {
		return catalog.Position{}
	}
	return s.position
}

// Has reports whether a server ever sent the topic; without that, nothing is
// known of it.
func (s *Snapshot) Has(topic Topic) bool {
	return s != nil && s.topics[topic] != nil
}

// Items yields a topic's keys, sorted, and the JSON that the server sent, byte
// for byte. The bytes must not be changed.
func (s *Snapshot) Items(topic Topic) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		if !s.Has(topic) {
			return
		}
		items := s.topics[topic].items
		for _, key := range slices.Sorted(maps.Keys(items)) {
			if !yield(key, items[key].json) {
				return
			}
		}
	}
}

// Get returns one item of a topic.
func (s *Snapshot) Get(topic Topic, key string) ([]byte, bool) {
	if !s.Has(topic) {
		return nil, false
	}
	it, ok := s.topics[topic].items[key]
	return it.json, ok
}
