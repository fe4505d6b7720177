package record

import (
	"errors"
	"sync"
	"sync/atomic"
)

// maxRecords is after how many records we change our key. AES-GCM is good for some 2^24 (RFC 8446 section 5.5).
const maxRecords = 1 << 23

// Content types, alerts and messages (RFC 8446 appendix B).
const (
	typeAlert     = 21
	typeHandshake = 22
	typeData      = 23

	alertWarning           = 1
	alertFatal             = 2
	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertUserCanceled      = 90

	messageHeader    = 4
	messageTicket    = 4
	messageKeyUpdate = 24
)

// errEnded is a write after the goodbye.
var errEnded = errors.New("write after the end of the session was told")

// output is the direction that a Conn writes.
type output struct {
	// asked says that the peer wants us to change our key before our next record. The reader sets it: were the reader to
	// answer itself, it would wait for a writer, and that one for the peer.
	asked atomic.Bool

	mu         sync.Mutex // of all below, and of what is being written
	keys       protection
	renewAfter uint64
	err        error // why nothing can be written any more
}

// write protects and writes parts. It returns how many of their bytes left in whole records.
func (o *output) write(t Transport, parts [3][]byte) (written int64, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	left := len(parts[0]) + len(parts[1]) + len(parts[2])
	for left > 0 && o.err == nil {
		o.renew(t)
		if o.err != nil {
			break
		}
		b := borrow(&smallOut, &largeOut, left > maxPlain)
		filled := 0
		for left > 0 && len(b.b)-b.w > ours {
			n := gather(b.b[b.w+headerSize:][:min(maxPlain, len(b.b)-b.w-ours)], &parts)
			b.w += o.keys.seal(b.b[b.w:], n, typeData)
			filled, left = filled+n, left-n
		}
		n, err := t.Write(b.b[:b.w])
		if err != nil {
			o.err = err
			filled = contentOf(b.b[:n])
		}
		written += int64(filled)
		giveBack(b, &smallOut, &largeOut)
	}
	return written, o.err
}

// gather moves bytes from the front of parts to p, and returns how many.
func gather(p []byte, parts *[3][]byte) (n int) {
	for i := range parts {
		m := copy(p[n:], parts[i])
		parts[i] = parts[i][m:]
		n += m
	}
	return n
}

// contentOf counts what whole records of ours carry.
func contentOf(wire []byte) (n int) {
	for len(wire) >= headerSize {
		size := payloadSize(wire)
		if len(wire) < headerSize+size {
			break
		}
		n += size + headerSize - ours
		wire = wire[headerSize+size:]
	}
	return n
}

// renew changes our key if it is time to.
func (o *output) renew(t Transport) {
	if o.keys.seq < o.renewAfter && !o.asked.Load() {
		return
	}
	o.asked.Store(false)
	// The last byte asks the peer for nothing in return.
	if o.message(t.Write, typeHandshake, messageKeyUpdate, 0, 0, 1, 0); o.err == nil {
		o.err = o.keys.update()
	}
}

// message writes one short record. o.mu is held.
func (o *output) message(write func([]byte) (int, error), typ byte, content ...byte) {
	b := make([]byte, len(content)+ours)
	copy(b[headerSize:], content)
	o.keys.seal(b, len(content), typ)
	if _, err := write(b); err != nil {
		o.err = err
	}
}

// end writes the goodbye.
func (o *output) end(t Transport) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return o.err
	}
	if o.message(t.Write, typeAlert, alertWarning, alertCloseNotify); o.err != nil {
		return o.err
	}
	o.err = errEnded
	return nil
}

// leave writes the goodbye if that is possible at once.
func (o *output) leave(t Transport) { o.last(t, alertWarning, alertCloseNotify) }

// complain tells the peer why the session ends, if that is possible at once.
func (o *output) complain(t Transport, alert byte) { o.last(t, alertFatal, alert) }

func (o *output) last(t Transport, level, alert byte) {
	if !o.mu.TryLock() {
		return // somebody is writing: a goodbye in between would wait
	}
	defer o.mu.Unlock()
	if o.err == nil {
		o.message(t.TryWrite, typeAlert, level, alert)
		o.err = errEnded
	}
}
