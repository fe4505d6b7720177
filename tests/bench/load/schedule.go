package load

import "time"

// schedule says when requests are due: at a constant rate, whatever becomes of
// those before. What a late request waited for its turn is part of its latency,
// or a server that stalls would be asked less while it does, and look fast
// ("coordinated omission", Gil Tene). The zero schedule has no requests due.
type schedule struct {
	perSecond int
}

// at is when request i is due, from the start.
func (s schedule) at(i int) time.Duration {
	return time.Duration(int64(i) * int64(time.Second) / int64(s.perSecond))
}
