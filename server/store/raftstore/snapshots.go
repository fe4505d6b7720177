package raftstore

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// sealedMagic begins the state of a sealed snapshot.
const sealedMagic = "meshd-sealed 1\n"

// snapshots are Raft's snapshots in files with two things added. The description
// of a snapshot (index, term, members), which lies in a file without a checksum,
// is repeated at the head of the state, which has one; Open compares them. And
// the names of a snapshot's two files are synced before it counts: otherwise a
// power loss may leave an empty folder, after the log was cut for it.
type snapshots struct {
	*raft.FileSnapshotStore

	dir string // that the folders of the snapshots lie in
}

var _ raft.SnapshotStore = snapshots{}

// openSnapshots opens or creates the folder of the snapshots in a state directory.
func openSnapshots(dir string, logger hclog.Logger) (snapshots, error) {
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, snapshotsKept, logger.Named("snapshot"))
	if err != nil {
		return snapshots{}, fmt.Errorf("open the snapshots in %s: %w", dir, err)
	}
	return snapshots{FileSnapshotStore: files, dir: filepath.Join(dir, "snapshots")}, nil
}

// sealed is the description of a snapshot. Its ID and size are not in it: they
// differ between members.
type sealed struct {
	Version            raft.SnapshotVersion
	Index, Term        uint64
	Configuration      raft.Configuration
	ConfigurationIndex uint64
}

func (s sealed) encode() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the description of a snapshot: %w", err)
	}
	b := binary.BigEndian.AppendUint32([]byte(sealedMagic), uint32(len(body))) //nolint:gosec // far smaller
	b = append(b, body...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))), nil
}

// Create implements raft.SnapshotStore.
func (s snapshots) Create(version raft.SnapshotVersion, index, term uint64, members raft.Configuration,
	membersIndex uint64, trans raft.Transport,
) (raft.SnapshotSink, error) {
	head, err := sealed{Version: version, Index: index, Term: term, Configuration: members, ConfigurationIndex: membersIndex}.encode()
	if err != nil {
		return nil, err
	}
	sink, err := s.FileSnapshotStore.Create(version, index, term, members, membersIndex, trans)
	if err != nil {
		return nil, err //nolint:wrapcheck // Raft says what it was doing
	}
	if _, err := sink.Write(head); err != nil {
		return nil, errors.Join(fmt.Errorf("begin snapshot %s: %w", sink.ID(), err), sink.Cancel())
	}
	return sealedSink{SnapshotSink: sink, dir: filepath.Join(s.dir, sink.ID()+".tmp")}, nil
}

type sealedSink struct {
	raft.SnapshotSink

	dir string
}

// Close implements io.Closer. Both files exist since Create. After a Cancel
// neither does, and there is nothing to close.
func (s sealedSink) Close() error {
	if err := syncDir(s.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, s.Cancel())
	}
	return s.SnapshotSink.Close() //nolint:wrapcheck // Raft says what it was doing
}

// Open implements raft.SnapshotStore. A snapshot that is not as its seal says is
// store.ErrCorrupt. Those of earlier versions have none.
func (s snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, file, err := s.FileSnapshotStore.Open(id)
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // Raft says what it was doing
	}
	r := bufio.NewReader(file)
	length, err := unsealSnapshot(r, meta)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open snapshot %s: %w", id, err), file.Close())
	}
	meta.Size -= length
	return meta, sealedReader{Reader: r, Closer: file}, nil
}

type sealedReader struct {
	io.Reader
	io.Closer
}

// unsealSnapshot reads the seal, if there is one, and returns its length.
func unsealSnapshot(r *bufio.Reader, meta *raft.SnapshotMeta) (int64, error) {
	if begin, err := r.Peek(len(sealedMagic)); err != nil || string(begin) != sealedMagic {
		return 0, nil //nolint:nilerr // a state that short has no seal; who reads it will see
	}
	want, err := sealed{
		Version: meta.Version, Index: meta.Index, Term: meta.Term,
		Configuration: meta.Configuration, ConfigurationIndex: meta.ConfigurationIndex,
	}.encode()
	if err != nil {
		return 0, err
	}
	have := make([]byte, len(want))
	if _, err := io.ReadFull(r, have); err != nil {
		return 0, fmt.Errorf("%w: read its seal: %w", store.ErrCorrupt, err)
	}
	if string(have) != string(want) {
		return 0, fmt.Errorf("%w: its description is not the one that it was written with", store.ErrCorrupt)
	}
	return int64(len(want)), nil
}
