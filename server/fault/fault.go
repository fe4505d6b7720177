// Package fault breaks this program on purpose, to prove that the fault suite
// notices. Two things can be asked of a build with the tag "fault": to fail at a
// named point ([Point], [Err]), and to contain a known bug ([Bug]). In every
// other build both are constant and compile to nothing.
//
// MESH_FAILPOINT=name=action[:n][,…] arms failpoints: at the n-th time that the
// point is reached (the first, if n is not given) the process panics (panic),
// ends at once without any clean-up, as if killed (exit), or stops that goroutine
// for ever (hang); with error, Err returns an error from the n-th time on.
// MESH_BUG=name[,…] plants bugs. [Check] refuses names that do not exist.
// MESH_SNAPSHOT_INTERVAL=1s lets a server look that often whether its log has grown
// enough to be cut, so that a test need not wait for that.
package fault

// Environment variables that a build with the tag "fault" reads.
const (
	EnvPoints           = "MESH_FAILPOINT"
	EnvBugs             = "MESH_BUG"
	EnvSnapshotInterval = "MESH_SNAPSHOT_INTERVAL"
)

// Failpoints. "Before" is before anything of the step has happened, "after" is
// when it is complete and durable but nobody was told.
const (
	LogWriteBefore        = "log-write-before"        // entries of the log
	LogWriteAfter         = "log-write-after"         //
	FsyncBefore           = "fsync-before"            // of a file of the log: bytes are written, not yet synced
	FsyncAfter            = "fsync-after"             //
	VoteBefore            = "vote-before"             // Raft's term and vote
	VoteAfter             = "vote-after"              //
	ApplyBefore           = "apply-before"            // a committed entry to the state
	ApplyAfter            = "apply-after"             //
	SnapshotWriteBefore   = "snapshot-write-before"   // a saved state
	SnapshotWriteMiddle   = "snapshot-write-middle"   // its bytes are written, it is not complete
	SnapshotWriteAfter    = "snapshot-write-after"    //
	SnapshotInstallBefore = "snapshot-install-before" // a saved state that comes from the leader or from the disk
	SnapshotInstallAfter  = "snapshot-install-after"  //
	TruncateBefore        = "truncate-before"         // the removal of entries from the log
	TruncateAfter         = "truncate-after"          //
	CASignBefore          = "ca-sign-before"          // the signature of a certificate
	CASignAfter           = "ca-sign-after"           //
	KeyWriteBefore        = "key-write-before"        // a private key to the store or to a file
	KeyWriteAfter         = "key-write-after"         //
)

// Points returns the names of all failpoints.
func Points() []string {
	return []string{
		LogWriteBefore, LogWriteAfter, FsyncBefore, FsyncAfter, VoteBefore, VoteAfter, ApplyBefore, ApplyAfter,
		SnapshotWriteBefore, SnapshotWriteMiddle, SnapshotWriteAfter, SnapshotInstallBefore, SnapshotInstallAfter,
		TruncateBefore, TruncateAfter, CASignBefore, CASignAfter, KeyWriteBefore, KeyWriteAfter,
	}
}

// Name names a bug that can be planted.
type Name string

// Bugs that can be planted.
const (
	// SkipFsync acknowledges entries of the log that were written but not synced.
	SkipFsync Name = "skip-fsync"
	// AnswerBeforeCommit acknowledges a write that only the leader has seen.
	AnswerBeforeCommit Name = "answer-before-commit"
	// ReuseRevision gives two writes of one key in a row the same revision.
	ReuseRevision Name = "reuse-revision"
	// DropDeletion leaves the deletions out of a batch that also has puts.
	DropDeletion Name = "drop-deletion"
	// StaleAsLinearizable answers a barrier from the member's own state.
	StaleAsLinearizable Name = "stale-as-linearizable"
	// ForgetVote does not write down whom a member has voted for.
	ForgetVote Name = "forget-vote"
	// ApplyTwice applies some committed entries once more after their successor.
	ApplyTwice Name = "apply-twice"
	// LoseLastSnapshotEntry leaves the newest write out of a saved state.
	LoseLastSnapshotEntry Name = "lose-last-snapshot-entry"
	// SkipCatchUp answers on a follower before its own state has what is answered.
	SkipCatchUp Name = "skip-catch-up"
	// IgnoreChecks applies a transaction whose checks do not hold.
	IgnoreChecks Name = "ignore-checks"
)

// Bugs returns the names of all bugs.
func Bugs() []Name {
	return []Name{
		SkipFsync, AnswerBeforeCommit, ReuseRevision, DropDeletion, StaleAsLinearizable, ForgetVote,
		ApplyTwice, LoseLastSnapshotEntry, SkipCatchUp, IgnoreChecks,
	}
}
