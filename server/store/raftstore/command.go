package raftstore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/meshd/meshd/server/store"
)

// commandKind is the first byte of a log entry. Numbers are never used again. A member
// ends at an entry that it can't read: every build that runs several servers knows the
// kinds below, and a further one is for a feature level that all of them have reached.
type commandKind byte

const (
	commandBegin      commandKind = 1 // name the first generation
	commandCommit     commandKind = 2
	commandClaim      commandKind = 3 // take the leadership
	commandResign     commandKind = 4
	commandOpenStage  commandKind = 5
	commandWriteStage commandKind = 6
	commandActivate   commandKind = 7
	commandDropStage  commandKind = 8
	commandMark       commandKind = 9 // hash the state
)

// command is one entry of the log: a change of the Space.
type command struct {
	Kind       commandKind
	Generation string         // of Begin and of the stage
	Holder     string         // of Claim
	Epoch      uint64         // of Commit and Resign
	From       store.Position // of Activate
	Txn        store.Txn      // of Commit; its Ops of WriteStage
}

const (
	flagLeader = 1 << iota
	flagDelete = 1 << iota
)

// maxName bounds the name of a server or a generation in a command.
const maxName = 256

var errCommand = errors.New("not a command of this version")

// travels reports whether the leader takes c from another member. The others are
// of the leader itself.
func (c command) travels() bool {
	switch c.Kind {
	case commandCommit:
		return !c.Txn.Leader
	case commandOpenStage, commandWriteStage, commandActivate, commandDropStage, commandMark:
		return true
	case commandBegin, commandClaim, commandResign:
	}
	return false
}

// size is not less than the length of the encoded c.
func (c command) size() int {
	size := 64 + len(c.Generation) + len(c.Holder) + len(c.Txn.Generation) + len(c.From.Generation)
	for _, check := range c.Txn.Checks {
		size += len(check.Key) + 12
	}
	for _, op := range c.Txn.Ops {
		size += len(op.Key) + len(op.Value) + 8
	}
	return size
}

// encode returns the bytes of c. decodeCommand reads them back.
func (c command) encode() []byte { return c.appendTo(make([]byte, 0, c.size())) }

func (c command) appendTo(b []byte) []byte {
	b = append(b, byte(c.Kind))
	switch c.Kind {
	case commandMark:
	case commandBegin, commandOpenStage, commandDropStage:
		b = appendText(b, c.Generation)
	case commandClaim:
		b = appendText(b, c.Holder)
	case commandResign:
		b = binary.AppendUvarint(b, c.Epoch)
	case commandWriteStage:
		b = appendOps(appendText(b, c.Generation), c.Txn.Ops)
	case commandActivate:
		b = appendText(appendText(b, c.Generation), c.From.Generation)
		b = binary.AppendUvarint(b, c.From.Revision)
	case commandCommit:
		var flags byte
		if c.Txn.Leader {
			flags = flagLeader
		}
		b = appendText(append(b, flags), c.Txn.Generation)
		b = binary.AppendUvarint(b, c.Epoch)
		b = binary.AppendUvarint(b, uint64(len(c.Txn.Checks)))
		for _, check := range c.Txn.Checks {
			b = binary.AppendUvarint(appendText(b, check.Key), check.ModRevision)
		}
		b = appendOps(b, c.Txn.Ops)
	}
	return b
}

func appendText[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendOps(b []byte, ops []store.Op) []byte {
	b = binary.AppendUvarint(b, uint64(len(ops)))
	for _, op := range ops {
		if op.Delete {
			b = appendText(append(b, flagDelete), op.Key)
			continue
		}
		b = appendText(appendText(append(b, 0), op.Key), op.Value)
	}
	return b
}

// decodeCommand reads what encode wrote and refuses everything else. Values
// share their bytes with b.
func decodeCommand(b []byte) (command, error) {
	d := decoder{b: b}
	c := command{Kind: commandKind(d.byte())}
	switch c.Kind {
	case commandMark:
	case commandBegin, commandOpenStage, commandDropStage:
		c.Generation = d.generation()
	case commandClaim:
		c.Holder = string(d.blob(maxName))
	case commandResign:
		c.Epoch = d.number()
	case commandWriteStage:
		c.Generation = d.generation()
		c.Txn.Ops = d.ops()
	case commandActivate:
		c.Generation = d.generation()
		c.From = d.position()
	case commandCommit:
		flags := d.byte()
		d.demand(flags&^flagLeader == 0, "unknown flags")
		c.Txn.Leader = flags&flagLeader != 0
		c.Txn.Generation = string(d.blob(maxName))
		c.Epoch = d.number()
		for range d.count() {
			c.Txn.Checks = append(c.Txn.Checks, store.Check{Key: string(d.blob(store.MaxKey)), ModRevision: d.number()})
		}
		c.Txn.Ops = d.ops()
	default:
		d.demand(false, "unknown kind")
	}
	d.demand(len(d.b) == 0, "bytes follow it")
	if d.err == nil {
		if err := c.Txn.Validate(); err != nil {
			d.err = fmt.Errorf("%w: %w", errCommand, err)
		}
	}
	if d.err != nil {
		return command{}, fmt.Errorf("decode a log entry of kind %d: %w", c.Kind, d.err)
	}
	return c, nil
}

// decoder cuts fields off b. Its first error sticks.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) demand(ok bool, problem string) {
	if !ok && d.err == nil {
		d.err = fmt.Errorf("%w: %s", errCommand, problem)
		d.b = nil
	}
}

func (d *decoder) byte() byte {
	d.demand(len(d.b) > 0, "it is cut off")
	if d.err != nil {
		return 0
	}
	first := d.b[0]
	d.b = d.b[1:]
	return first
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.b)
	d.demand(size > 0, "a number is cut off or too large")
	if d.err != nil {
		return 0
	}
	d.b = d.b[size:]
	return n
}

// count reads how many elements follow, each of at least one byte.
func (d *decoder) count() int {
	n := d.number()
	d.demand(n <= store.MaxKeys, "too many elements")
	if d.err != nil {
		return 0
	}
	return int(n) //nolint:gosec // at most MaxKeys
}

func (d *decoder) blob(limit int) []byte {
	n := d.number()
	d.demand(n <= uint64(limit) && n <= uint64(len(d.b)), "a field is cut off or too long") //nolint:gosec // limit is a positive constant
	if d.err != nil {
		return nil
	}
	field := d.b[:n:n]
	d.b = d.b[n:]
	return field
}

func (d *decoder) generation() string {
	name := string(d.blob(maxName))
	d.demand(d.err != nil || store.ValidateGeneration(name) == nil, "not the name of a generation")
	return name
}

func (d *decoder) position() store.Position {
	return store.Position{Generation: string(d.blob(maxName)), Revision: d.number()}
}

func (d *decoder) ops() []store.Op {
	var ops []store.Op
	for range d.count() {
		flags := d.byte()
		d.demand(flags&^flagDelete == 0, "unknown flags")
		op := store.Op{Delete: flags&flagDelete != 0, Key: string(d.blob(store.MaxKey))}
		if !op.Delete {
			op.Value = d.blob(store.MaxBytes)
		}
		ops = append(ops, op)
	}
	return ops
}
