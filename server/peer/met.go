package peer

import (
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/server/meshpb"
)

// metFor is for how long a server is remembered that is not heard of.
const metFor = time.Minute

// met remembers servers that said hello, or were named by others, so that those
// are found who are not in this server's retry_join.
type met struct {
	mu   sync.Mutex
	seen map[string]sighting // by address
	more chan struct{}       // holds a token when there is a new one
}

type sighting struct {
	id     string
	direct bool // it was heard itself; of others nothing is passed on
	at     time.Time
}

func newMet() *met {
	return &met{seen: map[string]sighting{}, more: make(chan struct{}, 1)}
}

// heard notes a server that has spoken itself, or was named by another.
func (m *met) heard(found Member, direct bool, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for address, s := range m.seen {
		if now.Sub(s.at) > metFor {
			delete(m.seen, address)
		}
	}
	old, known := m.seen[found.Address]
	if known && !direct || !known && len(m.seen) >= maxTargets {
		return
	}
	m.seen[found.Address] = sighting{id: found.ID, direct: direct, at: now}
	if !known || old.id != found.ID {
		select {
		case m.more <- struct{}{}:
		default:
		}
	}
}

// addressOf returns where the server of an ID has said that it is, "" if it has not
// lately.
func (m *met) addressOf(id string, now time.Time) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	newest, found := time.Time{}, ""
	for address, s := range m.seen {
		if s.id == id && s.direct && now.Sub(s.at) <= metFor && s.at.After(newest) {
			newest, found = s.at, address
		}
	}
	return found
}

// servers are those to tell others of.
func (m *met) servers() []*meshpb.KnownServer {
	m.mu.Lock()
	defer m.mu.Unlock()
	servers := make([]*meshpb.KnownServer, 0, len(m.seen))
	for address, s := range m.seen {
		if s.direct {
			servers = append(servers, &meshpb.KnownServer{Id: s.id, Address: address})
		}
	}
	return servers
}

func (m *met) addresses() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	addresses := make([]string, 0, len(m.seen))
	for address := range m.seen {
		addresses = append(addresses, address)
	}
	slices.Sort(addresses)
	return addresses
}
