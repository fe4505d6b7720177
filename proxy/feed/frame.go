package feed

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

const (
	// MaxFrame is the longest JSON of a frame, in bytes. A longer plan travels in several frames, see Plan.More.
	MaxFrame = 4 << 20
	// maxPayload is how much content the sender puts into one frame, far enough below MaxFrame for what JSON adds.
	maxPayload = 1 << 20
	// maxPart is the longest JSON of one part that can be sent.
	maxPart = MaxFrame - maxPayload
	// maxDescriptors is how many descriptors the sender puts on one frame; Linux allows 253 (SCM_MAX_FD).
	maxDescriptors = 64
	// headerSize is the length before a frame's JSON.
	headerSize = 4
)

// ErrFrame is wrapped by every error about bytes that are no frame, and about frames out of place.
var ErrFrame = errors.New("bad frame")

// State is what a proxy process does with new connections.
type State string

// The states.
const (
	// Starting is the state of a process that takes the place of another, and does not accept yet.
	Starting State = "starting"
	Active   State = "active"
	Draining State = "draining"
)

// Frame is one message. Exactly one member is set.
type Frame struct {
	Hello   *Hello   `json:"hello,omitempty"`   // proxy to agent, first
	Applied *Applied `json:"applied,omitempty"` // proxy to agent
	Bye     *Bye     `json:"bye,omitempty"`     // proxy to agent, last
	Plan    *Plan    `json:"plan,omitempty"`    // agent to proxy
	Keys    *Keys    `json:"keys,omitempty"`    // agent to proxy
	State   *SetTo   `json:"state,omitempty"`   // both ways
	Sockets *Sockets `json:"sockets,omitempty"` // both ways, with descriptors
	Query   *Query   `json:"query,omitempty"`   // agent to proxy
	Answer  *Answer  `json:"answer,omitempty"`  // proxy to agent
	// Restart asks a process that said Hello.Restarts for a successor; Restarted answers.
	Restart   *Restart   `json:"restart,omitempty"`   // agent to proxy
	Restarted *Restarted `json:"restarted,omitempty"` // proxy to agent
	Step      *Step      `json:"step,omitempty"`      // both ways, on a Link only
	Counters  *Counters  `json:"counters,omitempty"`  // on a Link only
}

// Hello opens a session.
type Hello struct {
	Proxy        string `json:"proxy"`
	Session      string `json:"session"`
	PID          int    `json:"pid"`
	Version      string `json:"version"`
	FeatureLevel int    `json:"feature_level"`
	State        State  `json:"state"`
	// Parts are the hashes, by key, of the parts in the proxy's hands.
	Parts map[string]string `json:"parts,omitempty"`
	// Keys are the hashes, by identity, of the chains in the proxy's hands.
	Keys map[string]string `json:"keys,omitempty"`
	// Applied is the position of the plan in force.
	Applied catalog.Position `json:"applied"`
	// Watches says that the proxy answers queries, Restarts that it can start its successor.
	Watches  bool `json:"watches,omitempty"`
	Restarts bool `json:"restarts,omitempty"`
}

// Applied tells what became of a plan, or of the keys and sockets that go with it.
type Applied struct {
	// Seq is that of the plan which is answered, 0 if this answers none.
	Seq uint64 `json:"seq,omitempty"`
	// Position is that of the plan in force.
	Position catalog.Position `json:"position"`
	// Refused, if not empty, says why the plan of RefusedPosition was not taken.
	Refused         string           `json:"refused,omitempty"`
	RefusedPosition catalog.Position `json:"refused_position,omitzero"`
	// Closed is how many live connections and streams the change cut.
	Closed uint64 `json:"closed,omitempty"`
	// Open is how many connections are open.
	Open int `json:"open"`
}

// Bye ends a session on purpose: the process is about to exit.
type Bye struct{}

// Plan is a change of the proxy's plan. All frames up to the first without More are one change, taken or refused whole.
type Plan struct {
	Seq      uint64           `json:"seq"`
	Position catalog.Position `json:"position"`
	Put      []proxy.Part     `json:"put,omitempty"`
	Drop     []string         `json:"drop,omitempty"`
	More     bool             `json:"more,omitempty"`
}

// Keys is a change of the leaf certificates in the proxy's hands.
type Keys struct {
	Put  []Key       `json:"put,omitempty"`
	Drop []spiffe.ID `json:"drop,omitempty"`
}

// Key is a leaf certificate with its private key, as it travels and is stored. It prints as its identity only.
type Key struct {
	ID    spiffe.ID `json:"id"`
	Chain [][]byte  `json:"chain"` // DER, leaf first
	Key   []byte    `json:"key"`   // PKCS #8
}

// Format writes the identity alone, for every verb.
func (k Key) Format(w fmt.State, _ rune) { _, _ = io.WriteString(w, "key of "+k.ID.String()) }

// SetTo asks a proxy process to change its state, or tells the agent that it did.
type SetTo struct {
	To State `json:"to"`
	// Until, of a draining process, is when it cuts what is left; zero is never. Open is how many connections are left.
	Until time.Time `json:"until,omitzero"`
	Open  int       `json:"open,omitempty"`
}

// Restart asks a proxy process to start its program anew, beside itself, and to hand over to it.
type Restart struct {
	ID uint64 `json:"id"`
}

// Restarted answers Restart: another process serves, or Error says why not.
type Restarted struct {
	ID    uint64 `json:"id"`
	PID   int    `json:"pid,omitempty"`
	Error string `json:"error,omitempty"`
}

// Sockets passes listening sockets: the frame carries one descriptor per name, in the same order.
type Sockets struct {
	Names []string `json:"names,omitempty"`
	// Close names sockets that the receiver shall close.
	Close []string `json:"close,omitempty"`
}

// valid holds a frame to having one member.
func (f Frame) valid() error {
	n := 0
	for _, set := range []bool{
		f.Hello != nil, f.Applied != nil, f.Bye != nil, f.Plan != nil, f.Keys != nil, f.State != nil, f.Sockets != nil,
		f.Query != nil, f.Answer != nil, f.Restart != nil, f.Restarted != nil, f.Step != nil, f.Counters != nil,
	} {
		if set {
			n++
		}
	}
	if n != 1 {
		return fmt.Errorf("%w: %d known members, want one; the other side may be much newer", ErrFrame, n)
	}
	return nil
}

// AppendFrame appends the wire form of f to dst.
func AppendFrame(dst []byte, f Frame) ([]byte, error) {
	if err := f.valid(); err != nil {
		return dst, err
	}
	data, err := json.Marshal(f)
	if err != nil {
		return dst, fmt.Errorf("%w: write it as JSON: %w", ErrFrame, err)
	}
	if len(data) > MaxFrame {
		return dst, fmt.Errorf("%w: %d bytes long, at most %d can be sent", ErrFrame, len(data), MaxFrame)
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(data))) //nolint:gosec // bounded above
	return append(dst, data...), nil
}

// ReadFrame reads one frame. The error is io.EOF at a clean end between frames; errors about content wrap ErrFrame. It holds
// no more memory than bytes arrived.
func ReadFrame(r io.Reader) (Frame, error) {
	var header [headerSize]byte
	if n, err := io.ReadFull(r, header[:]); err != nil {
		if n == 0 && errors.Is(err, io.EOF) {
			return Frame{}, io.EOF
		}
		return Frame{}, fmt.Errorf("read a frame's length: %w", err)
	}
	length := int64(binary.BigEndian.Uint32(header[:]))
	if length > MaxFrame {
		return Frame{}, fmt.Errorf("%w: %d bytes long, at most %d are read", ErrFrame, length, MaxFrame)
	}
	var data bytes.Buffer
	if _, err := io.CopyN(&data, r, length); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, fmt.Errorf("read a frame of %d bytes: %w", length, err)
	}
	var f Frame
	if err := json.Unmarshal(data.Bytes(), &f); err != nil {
		return Frame{}, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	return f, f.valid()
}
