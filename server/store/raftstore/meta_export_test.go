package raftstore

import "github.com/hashicorp/raft-wal/types"

// NewMeta returns a store of what the log knows of its files.
func NewMeta() types.MetaStore { return &metaFile{} }

// DecodeMeta reads the content of its file.
func DecodeMeta(b []byte) error {
	_, err := decodeMeta(b)
	return err
}
