package flow

import (
	"context"
	"slices"
	"sync"
)

const (
	// mailboxRecords is how many records wait in a Mailbox.
	mailboxRecords = 2048
	// mailboxSamples bounds the processes of which the newest sample waits.
	mailboxSamples = 8192
)

// Mailbox brings the pieces of many answers together for one reader. Who puts
// never waits: of records what does not fit is dropped and counted, of samples the
// newest of each process waits. It is safe for concurrent use; see NewMailbox.
type Mailbox struct {
	wake chan struct{}
	// keep is how many of the newest records of the past are kept; 0: records come
	// as they happen.
	keep int

	mu      sync.Mutex
	answer  Answer
	samples map[string]*Sample
	order   []string
}

// NewMailbox returns a Mailbox for the answers to a query.
func NewMailbox(q Query) *Mailbox {
	m := &Mailbox{wake: make(chan struct{}, 1), samples: map[string]*Sample{}}
	if !q.Lasting() {
		m.keep = q.Limit
		if m.keep == 0 {
			m.keep = MaxLimit
		}
	}
	return m
}

// Put adds a piece. Its Done and Error say nothing of the others, and are ignored.
func (m *Mailbox) Put(a Answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answer.Dropped += a.Dropped
	m.answer.Caught = m.answer.Caught || a.Caught
	m.answer.Kept = m.answer.Kept.Worse(a.Kept)
	if a.Hosts > 0 || a.Silent != nil {
		m.answer.Hosts, m.answer.Silent = a.Hosts, a.Silent
	}
	m.records(a.Records)
	if s := a.Sample; s != nil {
		key := s.Node + "\x00" + s.Session
		if m.samples[key] == nil {
			if len(m.order) >= mailboxSamples {
				return
			}
			m.order = append(m.order, key)
		}
		m.samples[key] = s
	}
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Mailbox) records(records []Record) {
	if m.keep > 0 {
		m.answer.Records = append(m.answer.Records, records...)
		if len(m.answer.Records) > 2*m.keep {
			m.answer.Records = slices.Clip(Newest(m.answer.Records, m.keep))
		}
		return
	}
	room := max(0, mailboxRecords-len(m.answer.Records))
	if len(records) > room {
		m.answer.Dropped += uint64(len(records) - room) //nolint:gosec // positive
		records = records[:room]
	}
	m.answer.Records = append(m.answer.Records, records...)
}

// Take returns what waits, and nothing if nothing does. Each piece has one sample
// at most.
func (m *Mailbox) Take() []Answer {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Answer
	a := m.answer
	if m.keep > 0 {
		a.Records = Newest(a.Records, m.keep)
	}
	if len(a.Records) > 0 || a.Dropped > 0 || a.Caught || a.Kept != (Kept{}) {
		out = append(out, a)
	}
	for _, key := range m.order {
		out = append(out, Answer{Sample: m.samples[key]})
		delete(m.samples, key)
	}
	m.answer, m.order = Answer{}, nil
	return out
}

// Drain hands emit what comes, until ended is closed and all was handed over, emit
// fails, or ctx ends, which is no error.
func (m *Mailbox) Drain(ctx context.Context, ended <-chan struct{}, emit func(Answer) error) error {
	wake := m.wake
	if m.keep > 0 {
		wake = nil // all of the past is sorted before it is shown
	}
	for last := false; ; {
		if wake != nil || last {
			for _, a := range m.Take() {
				if err := emit(a); err != nil {
					return err
				}
			}
		}
		if last {
			return nil
		}
		select {
		case <-wake:
		case <-ended:
			last = true
		case <-ctx.Done():
			return nil
		}
	}
}
