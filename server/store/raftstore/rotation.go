package raftstore

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/types"
)

// finishRotation does what raft-wal does not when a crash came after the newest
// file of the log was finished and before its metadata named the next one: wal.Open
// takes the finished file for the newest, and every write to it fails with
// types.ErrSealed, after each restart. The next file is named here; wal.Open makes
// it. It reports whether there was anything to do.
func finishRotation(meta types.MetaStore, filer types.SegmentFiler, known types.PersistentState, limit int) (done bool, err error) {
	n := len(known.Segments)
	if n == 0 || !known.Segments[n-1].SealTime.IsZero() {
		return false, nil
	}
	tail, err := filer.RecoverTail(known.Segments[n-1])
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // a crash came between its name and its creation
	}
	if err != nil {
		return false, fmt.Errorf("read the newest file of the log: %w", err)
	}
	last := tail.LastIndex()
	sealed, index, err := tail.Sealed()
	if err := errors.Join(err, tail.Close()); err != nil || !sealed {
		return false, err //nolint:wrapcheck // raft-wal's own words
	}
	next := types.PersistentState{NextSegmentID: known.NextSegmentID + 1, Segments: slices.Clone(known.Segments)}
	finished := &next.Segments[n-1]
	finished.SealTime, finished.MaxIndex, finished.IndexStart = time.Now(), last, index
	next.Segments = append(next.Segments, types.SegmentInfo{
		ID: known.NextSegmentID, BaseIndex: last + 1, MinIndex: last + 1,
		Codec: wal.CodecBinaryV1, CreateTime: time.Now(), SizeLimit: uint32(limit), //nolint:gosec // by Config.Validate
	})
	if err := meta.CommitState(next); err != nil {
		return false, fmt.Errorf("name the next file of the log: %w", err)
	}
	return true, nil
}
