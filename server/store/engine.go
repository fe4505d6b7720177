package store

import "context"

// Engine is a transactional key space with one current generation.
//
// Keys are logical: an engine hides under which real keys, and under which
// generation, it keeps them. All methods are safe for concurrent use. They
// block until done, until ctx ends, or until Close; a method that was given a
// ctx that has ended already does nothing. Engines copy what they keep: a caller
// may reuse the slices that it passed as soon as the method returns. Slices that
// an engine returns may be shared with other callers and must not be modified.
//
// Every engine passes the suite in server/store/storetest.
type Engine interface {
	// List returns all pairs whose key starts with prefix, in byte order of the
	// keys, as they were at one position ("" lists everything). It reads at
	// least what this Engine value has returned before (its own Commits, batches
	// and Barriers), but may be behind the cluster: for a linearizable read call
	// Barrier first.
	//
	// Errors: ctx's, ErrClosed, ErrNoLeader when the store has never had a
	// leader or can't be reached.
	List(ctx context.Context, prefix string) (Snapshot, error)

	// Commit applies all operations of txn or none, as one revision, and
	// returns its position. A nil error means durable on a majority. A Txn
	// without operations only evaluates its checks and returns the position at
	// which they held. A Txn with operations always makes a new revision, even
	// if it only deletes keys that do not exist.
	//
	// Errors, all of which but ErrUnknownOutcome mean that nothing was applied:
	// ErrInvalid and ErrTooLarge (see Txn.Validate), *ConflictError (which is
	// ErrConflict) when a check or txn.Generation does not hold, ErrNotLeader
	// when txn.Leader does not hold, ErrDiskFull, ErrNoLeader, ErrClosed, ctx's
	// error.
	// ErrUnknownOutcome says that the transaction may have been applied, or may
	// still be: read again and compare the content before a retry. It wraps its
	// cause, so it may be ctx's error or ErrClosed as well: test for it first.
	Commit(ctx context.Context, txn Txn) (Position, error)

	// Watch returns a Watcher of the keys that start with prefix, from just
	// after the given position on. The zero Position, like one that can't be
	// served any more, starts with a Reset batch that holds the full state. The
	// watcher lives until ctx ends. Watch does no I/O.
	Watch(ctx context.Context, prefix string, after Position) Watcher

	// Barrier returns a position that covers every Commit that was acknowledged
	// anywhere in the cluster before the call, and confirms it with a majority.
	// A List after it, on the same Engine value, is linearizable; so is the
	// state of a Watcher of prefix "" once its batches reach that position.
	//
	// Errors: ctx's, ErrNoLeader, ErrClosed.
	Barrier(ctx context.Context) (Position, error)

	// Lead campaigns for the leadership of the cluster and runs fn while this
	// process holds it. fn's context ends when the leadership is lost, ctx ends,
	// or the engine is closed; fn should then return soon. Lead waits for it
	// before it campaigns again. While fn runs, and only then, a Txn with Leader
	// set can succeed; at most one process of the cluster is in that state, and
	// the store itself checks it.
	//
	// Lead returns nil when ctx ends; what fn returned, if fn returned while it
	// held the leadership (which is then given up, as far as the engine can);
	// ErrClosed after Close; ErrLeading at once when another Lead of this Engine
	// value has not returned yet.
	Lead(ctx context.Context, fn func(context.Context) error) error

	// Stage opens a new, empty generation beside the current one, to replace it
	// as a whole (see Replace). There is one stage per cluster: opening one
	// discards the stage that was open before, whose methods then return
	// ErrStageLost. Staged writes are invisible to List and Watch and do not move
	// the position of the current generation.
	//
	// Errors: as Commit's.
	Stage(ctx context.Context) (Stage, error)

	// Close releases the engine and wakes every waiter with ErrClosed. It waits
	// until the engine's own goroutines have ended; it does not wait for the
	// functions that Lead runs. A second Close returns nil.
	Close() error
}

// Watcher yields the changes of a prefix. It is used by one goroutine at a time.
type Watcher interface {
	// Next blocks until something after the last returned batch has changed
	// under the prefix and returns it all as one Batch.
	//
	// After ctx's error the Watcher is as before: nothing is lost and Next may be
	// called again. When the context that was given to Watch has ended, Next
	// returns its error for ever; after Close, ErrClosed. Engines ride out
	// interruptions of their connection inside Next.
	Next(ctx context.Context) (Batch, error)
}

// Stage is a generation that is being filled. Its methods are safe for
// concurrent use, but the order of concurrent Writes of one key is not defined.
type Stage interface {
	// Generation is the name of the staged generation.
	Generation() string

	// Write applies ops to the staged generation. The limits are those of a Txn.
	//
	// Errors: as Commit's (no conflict is possible), or ErrStageLost. After
	// ErrUnknownOutcome the same Write may be repeated.
	Write(ctx context.Context, ops []Op) error

	// Activate makes the staged generation the current one, in one step, and
	// returns its first position. It removes the generation that it replaces.
	// from.Generation, unless empty, must be current, and from.Revision, unless
	// 0, must be its last revision: set both when the staged data was computed
	// from a Snapshot, so that no write in between is lost. Every Watcher
	// continues with a Reset batch.
	//
	// Errors: as Commit's, or ErrStageLost. After an error the stage is still
	// open, except after ErrUnknownOutcome and ErrStageLost.
	Activate(ctx context.Context, from Position) (Position, error)

	// Discard removes the staged generation. It does nothing, and returns nil,
	// when the stage is lost, discarded or activated already.
	Discard(ctx context.Context) error
}

// Position is a point in the history of the store. Revisions are comparable
// within one generation only: a restore or a migration starts a new generation,
// in which revisions may be lower. Within a generation they only grow; gaps are
// normal. The zero Position is before everything.
type Position struct {
	Generation string `json:"generation"`
	Revision   uint64 `json:"revision"`
}

// IsZero reports whether p is the zero Position.
func (p Position) IsZero() bool { return p == Position{} }

// Covers reports whether a reader at p has seen q: both are of one generation
// and p is not before q. Positions of different generations never cover each
// other; every Position covers the zero one.
func (p Position) Covers(q Position) bool {
	return q.IsZero() || p.Generation == q.Generation && p.Revision >= q.Revision
}

// Pair is a key with its value.
type Pair struct {
	Key   string
	Value []byte
	// ModRevision is the revision of the Commit that wrote the value. It is never
	// 0 and never above the position that the pair was read at.
	ModRevision uint64
}

// Snapshot is the state of a prefix at one position.
type Snapshot struct {
	Position Position
	Pairs    []Pair // in byte order of the keys
}

// Batch is what changed under a prefix after From, up to and including To. It
// never holds a part of a transaction: applied to the state at From, or with
// Reset to nothing, it gives exactly the state at To. Batches of one Watcher are
// contiguous: From is the To of the batch before.
//
// A batch covers as many transactions as there were since the one before, so a
// slow reader gets fewer and larger batches; its size is bounded by the number
// of distinct keys.
type Batch struct {
	From, To Position
	// Reset says that Puts is the full state and that all earlier knowledge has
	// to be dropped. It is set on the first batch after a position that the
	// engine can't continue from: the zero one, one of another generation, one
	// whose deletions were forgotten since, one from the future.
	Reset bool
	// Puts holds the keys that were written and exist at To, with their newest
	// value, in byte order.
	Puts []Pair
	// Deletes holds the keys that were deleted and do not exist at To, in byte
	// order. A key may appear that the reader has never seen. It is empty with
	// Reset. A key that was deleted and then written again is in Puts only.
	Deletes []string
	// Puts and Deletes may both be empty: only the position moved. A Watcher of
	// prefix "" reaches every position that Commit and Barrier return.
}

// Txn is a transaction. Its limits are MaxKeys and MaxBytes.
type Txn struct {
	// Generation, unless empty, must be the current generation. Set it whenever
	// the transaction was computed from something that was read: "does not
	// exist" may be true again in the next generation.
	Generation string
	// Checks must all hold. No key is checked twice.
	Checks []Check
	// Ops are applied together. No key is written twice.
	Ops []Op
	// Leader makes the transaction hold only while this process runs a function
	// under Engine.Lead.
	Leader bool
}

// Check demands that the value under Key is the one that the revision
// ModRevision wrote; 0 demands that Key does not exist. There are no checks of
// whole prefixes: writers that must exclude each other share a key.
type Check struct {
	Key         string
	ModRevision uint64
}

// Op writes Value under Key, or deletes Key. To delete a key that does not exist
// is no error.
type Op struct {
	Key    string
	Value  []byte // ignored by a delete; nil is stored as an empty value
	Delete bool
}
