package hpack

import (
	"errors"
	"fmt"
)

// ErrCompression is a block that cannot be decoded. The table is undefined
// from there on: the connection ends with COMPRESSION_ERROR (RFC 9113 section
// 4.3).
var ErrCompression = errors.New("hpack: header block cannot be decoded")

// The kinds of [ErrCompression]. They are values: refusing allocates nothing.
var (
	ErrIndex     = fmt.Errorf("%w: an index is outside both tables", ErrCompression)
	ErrInteger   = fmt.Errorf("%w: an integer has more than five bytes or 32 bits", ErrCompression)
	ErrTruncated = fmt.Errorf("%w: it ends inside a field", ErrCompression)
	ErrHuffman   = fmt.Errorf("%w: a string is not valid Huffman code", ErrCompression)
	ErrTableSize = fmt.Errorf("%w: a table size update is misplaced, missing or above the limit", ErrCompression)
)

// ErrListTooLarge says that a list is longer than [Limits]. Nothing is wrong
// with the connection.
var ErrListTooLarge = errors.New("hpack: field list is larger than the limit")
