package view

import "time"

// Course is course, for tests.
type Course struct{ course }

// Next is next.
func (c *Course) Next(told, configured []string, now time.Time) (server string, again bool) {
	return c.next(told, configured, now)
}

// End is end.
func (c *Course) End(server string, welcomed bool, now time.Time) { c.end(server, welcomed, now) }

// MaxBackoff is maxBackoff.
const MaxBackoff = maxBackoff
