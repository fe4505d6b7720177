//go:build !fault

package fault

import "time"

// Enabled reports whether this build can be broken on purpose.
const Enabled = false

// Check returns an error when the environment asks for a failpoint or a bug that
// does not exist. Without the tag "fault" it asks for nothing.
func Check() error { return nil }

// Point fails here if the failpoint of that name is armed.
func Point(string) {}

// Err is a Point that returns an error if the failpoint is armed with error.
func Err(string) error { return nil }

// Bug reports whether the bug of that name is planted.
func Bug(Name) bool { return false }

// SnapshotInterval returns how often the log is looked at: as the environment says, or
// else as usual. Without the tag "fault" it is as usual.
func SnapshotInterval(usual time.Duration) time.Duration { return usual }
