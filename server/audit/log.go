package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
)

// ErrUnavailable is wrapped when a record could not be kept now; what it accounts
// for must not happen.
var ErrUnavailable = errors.New("the audit log takes no record")

// SyncDelay is how long a record may be with the operating system and not yet on
// the disk.
const SyncDelay = 100 * time.Millisecond

const (
	// queueSize bounds the records that are not on the disk yet.
	queueSize = 4096
	retryTime = time.Second
	// Denials of one caller beyond these are counted, not recorded: else whoever may
	// nothing could fill the disk, or have old records removed.
	denialsBurst     = 50
	denialsPerSecond = 5
	maxCallers       = 1024
)

// Config says where the log is, and how much of it is kept.
type Config struct {
	// Dir is the log's own folder; it is made with mode 0700.
	Dir string
	// Server is told in each record.
	Server string
	// Key signs the records.
	Key ca.Secret
	// FileBytes is the size at which a new file is begun, Files how many finished
	// ones are kept beside it.
	FileBytes int64
	Files     int
}

// Log is the audit log of one server. It is safe for concurrent use.
type Log struct {
	config Config
	log    *slog.Logger

	places  chan struct{} // one for each record that is not on the disk
	entries chan client.AuditRecord
	files   sync.RWMutex // held for writing while files change their names

	mu         sync.Mutex
	broken     error
	closed     bool
	head       head
	suppressed uint64 // since the last record that tells of it
	stats      Stats
	callers    map[string]*allowance
	changed    chan struct{}
}

// allowance is a token bucket.
type allowance struct {
	left float64
	at   time.Time
}

// Stats is what a Log has done since it was made.
type Stats struct {
	// Seq is that of the newest record.
	Seq uint64
	// Waiting is how many records are not on the disk yet.
	Waiting int
	// Suppressed counts what was noted and had no place: denials that came too fast,
	// and certificates that were signed while the log took no record.
	Suppressed uint64
	// Broken says why no record can be written, if so.
	Broken error
}

// New returns a Log, which takes records at once and writes them while Run runs.
func New(config Config, log *slog.Logger) *Log {
	return &Log{
		config: config, log: log, places: make(chan struct{}, queueSize), entries: make(chan client.AuditRecord, queueSize),
		callers: map[string]*allowance{}, changed: make(chan struct{}),
	}
}

// Stats returns what was done so far.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Seq, s.Waiting, s.Broken = l.head.seq, len(l.places), l.broken
	return s
}

// Reserve takes a place for the record of something that is about to be done, and
// returns the function that must be called with it once, afterwards. It does not
// block. The error wraps ErrUnavailable.
func (l *Log) Reserve() (func(client.AuditRecord), error) {
	l.mu.Lock()
	broken, closed := l.broken, l.closed
	l.mu.Unlock()
	switch {
	case closed:
		return nil, fmt.Errorf("%w: the server stops", ErrUnavailable)
	case broken != nil:
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, broken)
	}
	select {
	case l.places <- struct{}{}:
		return func(r client.AuditRecord) { l.entries <- r }, nil // there is room: each entry has a place
	default:
		return nil, fmt.Errorf("%w: %d records wait for the disk", ErrUnavailable, queueSize)
	}
}

// Note takes a record of what was refused, or only read. If there is no place, or
// the same caller makes too many, it is counted instead. It does not block.
func (l *Log) Note(r client.AuditRecord) {
	if l.mayNote(r.Who, time.Now()) {
		if keep, err := l.Reserve(); err == nil {
			keep(r)
			return
		}
	}
	l.mu.Lock()
	l.suppressed++
	l.stats.Suppressed++
	l.mu.Unlock()
}

func (l *Log) mayNote(who string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.callers[who]
	if a == nil {
		if len(l.callers) >= maxCallers {
			clear(l.callers)
		}
		a = &allowance{left: denialsBurst, at: now}
		l.callers[who] = a
	}
	a.left = min(denialsBurst, a.left+now.Sub(a.at).Seconds()*denialsPerSecond)
	a.at = now
	if a.left < 1 {
		return false
	}
	a.left--
	return true
}

// Run writes records until ctx ends, then those that are left, and returns nil. An
// error says that the folder can't be used, or that the disk has failed: what is
// on it is known only after a restart, so the process must end.
func (l *Log) Run(ctx context.Context) error {
	w, err := l.open()
	if err != nil {
		return fmt.Errorf("open the audit log: %w", err)
	}
	defer func() { _ = w.file.Close() }() // synced before
	if err := l.write(ctx, w); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	return nil
}

// write is Run's loop. Records that can't be written, as the disk is full, wait.
func (l *Log) write(ctx context.Context, w *writer) error {
	var batch []client.AuditRecord
	var sync <-chan time.Time
	second := time.NewTicker(retryTime)
	defer second.Stop()
	for ending := false; !ending; {
		select {
		case r := <-l.entries:
			batch = append(batch, r)
		case <-sync:
			sync = nil
			if err := l.sync(w); err != nil {
				return err
			}
			continue
		case <-second.C:
			batch = l.tellSuppressed(batch)
		case <-ctx.Done():
			l.mu.Lock()
			l.closed = true
			l.mu.Unlock()
			ending = true
		}
		batch = l.drain(batch)
		if ending {
			batch = append(l.tellSuppressed(batch), client.AuditRecord{Event: client.AuditClosed})
		}
		if len(batch) == 0 {
			continue
		}
		if err := l.put(ctx, w, batch); err != nil {
			if fatal, ok := errors.AsType[*fatalError](err); ok {
				return fatal.error
			}
			if ending {
				l.log.ErrorContext(ctx, "the server ends, and the audit log could not be written", slog.Int("lost", len(batch)))
			}
			continue // they stay in the batch
		}
		batch = batch[:0]
		if sync == nil {
			sync = time.After(SyncDelay)
		}
	}
	return l.sync(w)
}

// drain takes what else has come.
func (l *Log) drain(batch []client.AuditRecord) []client.AuditRecord {
	for {
		select {
		case r := <-l.entries:
			batch = append(batch, r)
		default:
			return batch
		}
	}
}

func (l *Log) tellSuppressed(batch []client.AuditRecord) []client.AuditRecord {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.suppressed == 0 || l.broken != nil {
		return batch
	}
	n := l.suppressed
	l.suppressed = 0
	return append(batch, client.AuditRecord{Event: client.AuditSuppressed, Count: n, Detail: "records without a place: of denials that came too fast, or of certificates while the log took none"})
}

// put writes a batch, and says so when that begins or ceases to be possible.
func (l *Log) put(ctx context.Context, w *writer, batch []client.AuditRecord) error {
	err := w.append(batch)
	l.mu.Lock()
	was := l.broken
	l.broken = err
	if err == nil {
		l.head = w.head
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()
	switch {
	case err != nil && was == nil:
		l.log.ErrorContext(ctx, "the audit log can't be written; changes are refused until it can", slog.Any("error", err))
	case err == nil && was != nil:
		l.log.WarnContext(ctx, "the audit log can be written again")
	}
	return err
}

// sync makes what was written durable, and gives its places back.
func (l *Log) sync(w *writer) error {
	if err := w.sync(); err != nil {
		return err
	}
	for ; w.held > 0; w.held-- {
		<-l.places
	}
	return nil
}

// Changed returns a channel that is closed when the next records are written.
func (l *Log) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}
