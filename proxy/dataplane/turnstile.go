package dataplane

import "github.com/meshd/meshd/proxy/sock"

// turnstile is the connection under a TLS handshake. It lets a few of them begin at a time: one takes a slot while the answer to
// its first message is computed, and none while it waits for its peer, so that however many peers say nothing, they keep nobody
// else out. From the answer on it needs no slot: of more handshakes than there is time for, those that began
// are finished, instead of all running late together. After end it is the plain connection. A read that waits ends with the
// handshake's context, which closes the connection.
type turnstile struct {
	*sock.Conn
	slots chan struct{}
	held  bool
	begun bool // the first message was answered, or all is over
}

// Read implements net.Conn.
func (t *turnstile) Read(b []byte) (int, error) {
	if t.begun {
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

// Write implements net.Conn.
func (t *turnstile) Write(b []byte) (int, error) {
	if !t.begun { // nothing is set after the handshake, when one goroutine reads and another writes
		t.end()
	}
	return t.Conn.Write(b)
}

// end gives the slot back for good. It is called by the goroutine that makes the handshake, or after that.
func (t *turnstile) end() {
	t.release()
	t.begun = true
}

func (t *turnstile) release() {
	if t.held {
		t.held = false
		<-t.slots
	}
}
