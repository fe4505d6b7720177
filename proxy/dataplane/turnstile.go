package dataplane

import "github.com/meshd/meshd/proxy/sock"

// turnstile is the connection under a TLS handshake. It takes one of a few slots
// while the handshake computes, and gives it back while it waits for the peer:
// however many peers say nothing, they keep nobody else out. After end it is the
// plain connection. A read that waits ends with the handshake's context, which
// closes the connection.
type turnstile struct {
	*sock.Conn
	slots chan struct{}
	held  bool
	over  bool
}

// Read implements net.Conn.
func (t *turnstile) Read(b []byte) (int, error) {
	if t.over {
		return t.Conn.Read(b)
	}
	t.release()
	n, err := t.Conn.Read(b)
	if err == nil {
		t.slots <- struct{}{} // whoever holds one computes, for less than a millisecond
		t.held = true
	}
	return n, err
}

// end gives the slot back for good. It is called by the goroutine that made the
// handshake, before any other one uses the connection.
func (t *turnstile) end() {
	t.release()
	t.over = true
}

func (t *turnstile) release() {
	if t.held {
		t.held = false
		<-t.slots
	}
}
