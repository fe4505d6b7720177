//go:build !linux

package sock

import "time"

// Unanswered is 0 where the system cannot be asked.
func (*Conn) Unanswered() time.Duration { return 0 }
