package bareraft

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

// A request is its length, in four bytes, and what decode reads; an empty one
// asks for the state of the member. An answer is a code and eight bytes: of the
// new revision, or of the term.
const (
	answerDone      = 0
	answerConflict  = 1
	answerNotLeader = 2
	answerFailed    = 3
	answerLeader    = 4
	answerFollower  = 5
	answerNobody    = 6
)

const (
	headLength   = 4
	answerLength = 9
	maxRequest   = 1 << 20
)

var (
	errRefused = errors.New("the member did not write")
	errFormat  = errors.New("malformed request")
)

// Refused reports whether an error is a member's answer, so that the connection
// can be used again.
func Refused(err error) bool { return errors.Is(err, errRefused) }

type set struct {
	key    string
	value  []byte
	expect uint64
}

func encode(s set) []byte {
	b := binary.AppendUvarint(nil, s.expect)
	b = binary.AppendUvarint(b, uint64(len(s.key)))
	return append(append(b, s.key...), s.value...)
}

func decode(b []byte) (set, error) {
	expect, n := binary.Uvarint(b)
	if n <= 0 {
		return set{}, errFormat
	}
	b = b[n:]
	length, n := binary.Uvarint(b)
	if n <= 0 || length > uint64(len(b)-n) {
		return set{}, errFormat
	}
	b = b[n:]
	return set{expect: expect, key: string(b[:length]), value: b[length:]}, nil
}

// serve answers one client until it is gone.
func serve(r *raft.Raft, conn net.Conn) {
	defer func() { _ = conn.Close() }() // the client is gone
	in := bufio.NewReader(conn)
	for {
		request, err := readRequest(in)
		if err != nil {
			return
		}
		var out [answerLength]byte
		var number uint64
		if len(request) == 0 {
			out[0], number = stateOf(r)
		} else {
			out[0], number = apply(r, request)
		}
		binary.BigEndian.PutUint64(out[1:], number)
		if _, err := conn.Write(out[:]); err != nil {
			return
		}
	}
}

func readRequest(in *bufio.Reader) ([]byte, error) {
	var head [headLength]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > maxRequest {
		return nil, errFormat
	}
	request := make([]byte, length)
	_, err := io.ReadFull(in, request)
	return request, err
}

func stateOf(r *raft.Raft) (byte, uint64) {
	leader, _ := r.LeaderWithID()
	switch {
	case r.State() == raft.Leader:
		return answerLeader, r.CurrentTerm()
	case leader != "":
		return answerFollower, r.CurrentTerm()
	default:
		return answerNobody, r.CurrentTerm()
	}
}

func apply(r *raft.Raft, request []byte) (byte, uint64) {
	f := r.Apply(request, enqueueing)
	err := f.Error()
	revision, _ := f.Response().(uint64)
	switch {
	case errors.Is(err, raft.ErrNotLeader):
		return answerNotLeader, 0
	case err != nil:
		return answerFailed, 0
	case revision == 0:
		return answerConflict, 0
	default:
		return answerDone, revision
	}
}

// Client talks to one member, for one goroutine.
type Client struct {
	conn net.Conn
	in   *bufio.Reader
}

// NewClient returns a client on a connection, which it closes.
func NewClient(conn net.Conn) *Client { return &Client{conn: conn, in: bufio.NewReader(conn)} }

// Close ends the connection.
func (c *Client) Close() { _ = c.conn.Close() } // nothing is waited for any more

// Set writes if the key has the expected revision, and returns the new one. Only
// the leader writes. After an error that is not Refused the client is of no use.
func (c *Client) Set(ctx context.Context, key string, value []byte, expect uint64) (uint64, error) {
	code, revision, err := c.ask(ctx, encode(set{key: key, value: value, expect: expect}))
	if err == nil && code != answerDone {
		err = fmt.Errorf("%w: it answers %d", errRefused, code)
	}
	return revision, err
}

// State returns what a member thinks: whether it leads, whether it knows a
// leader, and the term.
func (c *Client) State(ctx context.Context) (leads, led bool, term uint64, err error) {
	code, term, err := c.ask(ctx, nil)
	return code == answerLeader, code == answerLeader || code == answerFollower, term, err
}

func (c *Client) ask(ctx context.Context, request []byte) (byte, uint64, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(ioTimeout)
	}
	if err := c.conn.SetDeadline(deadline); err != nil {
		return 0, 0, err
	}
	defer context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })() // wakes the reader
	message := binary.BigEndian.AppendUint32(nil, uint32(len(request)))
	if _, err := c.conn.Write(append(message, request...)); err != nil {
		return 0, 0, err
	}
	var out [answerLength]byte
	if _, err := io.ReadFull(c.in, out[:]); err != nil {
		return 0, 0, err
	}
	return out[0], binary.BigEndian.Uint64(out[1:]), nil
}
