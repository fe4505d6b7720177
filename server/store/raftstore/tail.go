package raftstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"

	"github.com/meshd/meshd/server/store"
)

// The form of raft-wal's files, version 0: a header, then frames that begin at
// multiples of eight. A frame begins with its type, three zeros, and four bytes
// that hold its length or, in a commit, the CRC-32C of everything since the last
// commit.
const (
	segmentHeader = 32
	frameHeader   = 8

	frameEntry  = 1
	frameIndex  = 2
	frameCommit = 3
)

// checkTail reads the newest file of the log before raft-wal does. That stops at
// the first frame that makes no sense and takes the rest for a write that a crash
// tore: right for the last batch, which nobody was told of; in the middle it would
// forget acknowledged writes without a word. Where another batch begins after the
// damage, the damaged one was complete once, and the error is store.ErrCorrupt.
//
// Then it writes the last batches once more and syncs them: what a sync that failed
// left in the kernel's cache counts as written there, and would be taken for
// durable from now on. It returns where the last batch ends.
func checkTail(dir string, state types.PersistentState) (_ uint64, err error) {
	if len(state.Segments) == 0 {
		return 0, nil
	}
	last := state.Segments[len(state.Segments)-1]
	if !last.SealTime.IsZero() {
		return 0, nil
	}
	name := fmt.Sprintf("%020d-%016x.wal", last.BaseIndex, last.ID)
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0) //nolint:gosec // a file of the log
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // a crash came between its name and its creation
	}
	if err != nil {
		return 0, fmt.Errorf("read the newest file of the log: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	data, err := io.ReadAll(f)
	if err != nil {
		return 0, fmt.Errorf("read the newest file of the log: %w", err)
	}
	end, doubtful := readBatches(data)
	if at := batchAfter(data, end); at > 0 {
		return 0, fmt.Errorf("%w: the batch of entries at byte %d of %s is damaged, and another follows at byte %d",
			store.ErrCorrupt, end, filepath.Join(dir, name), at)
	}
	if _, err := f.WriteAt(data[doubtful:end], int64(doubtful)); err != nil {
		return 0, fmt.Errorf("write the end of the log again: %w", err)
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("sync the end of the log: %w", err)
	}
	return uint64(end), nil //nolint:gosec // a length
}

// readBatches returns where the first batch begins that is not whole, and where
// the last but one before it begins.
func readBatches(data []byte) (end, doubtful int) {
	begin, before, sealed := 0, 0, 0 // of the batch, of the one before; of what its checksum covers
	for at := segmentHeader; at+frameHeader <= len(data); {
		length := int(binary.LittleEndian.Uint32(data[at+4:]))
		switch data[at] {
		case frameEntry, frameIndex:
			at += frameHeader + (length+7)&^7
		case frameCommit:
			if crc32.Checksum(data[sealed:at], crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(data[at+4:]) {
				return begin, before
			}
			at += frameHeader
			begin, before, sealed = at, begin, at
		default:
			return begin, before
		}
	}
	return begin, before
}

// batchAfter returns where, beyond a byte, an entry begins right after a commit:
// a batch that was written after another one. 0 means that there is none.
func batchAfter(data []byte, from int) int {
	for at := max(from, segmentHeader); at+2*frameHeader <= len(data); at += frameHeader {
		next := data[at+frameHeader:]
		if data[at] != frameCommit || data[at+1]|data[at+2]|data[at+3] != 0 || next[0] != frameEntry {
			continue
		}
		length := int(binary.LittleEndian.Uint32(next[4:]))
		if length <= len(next)-frameHeader && isEntry(next[frameHeader:frameHeader+length]) {
			return at + frameHeader
		}
	}
	return 0
}

// isEntry reports whether b is an entry of the log with the checksum that it was
// written with. The form is that of raft-wal's codec: index, term and type as
// varints, data and extensions with their lengths, a time.
func isEntry(b []byte) bool {
	var numbers [3]uint64
	for i := range numbers {
		n, size := binary.Uvarint(b)
		if size <= 0 {
			return false
		}
		numbers[i], b = n, b[size:]
	}
	var fields [2][]byte
	for i := range fields {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(len(b)-size) { //nolint:gosec // size is at most the length of b
			return false
		}
		fields[i], b = b[size:size+int(n)], b[size+int(n):] //nolint:gosec // at most the length of b
	}
	entry := raft.Log{Index: numbers[0], Term: numbers[1], Type: raft.LogType(numbers[2]), Data: fields[0], Extensions: fields[1]} //nolint:gosec // a checksum follows
	return unseal(&entry) == nil
}
