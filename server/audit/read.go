package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"

	"github.com/meshd/meshd/server/client"
)

const (
	blockSize    = 64 << 10
	defaultLimit = 100
)

func sum(line []byte) [sha256.Size]byte { return sha256.Sum256(line) }

// scan reads lines from the begin.
func scan(r io.Reader) *bufio.Scanner {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	return s
}

// backward yields the finished lines of a file, the last first, each with where it
// begins. A line is valid until the next one. An error ends it, and is put into
// err.
func backward(file *os.File, err *error) iter.Seq2[[]byte, int64] { //nolint:gocritic // the error of an iteration
	return func(yield func([]byte, int64) bool) {
		info, bad := file.Stat()
		if bad != nil {
			*err = bad
			return
		}
		at := info.Size()
		var rest []byte // from at on: a begun line, whose begin lies before at
		finished := false
		for at > 0 {
			n := min(at, blockSize)
			block := make([]byte, n, int(n)+len(rest))
			if _, bad := file.ReadAt(block, at-n); bad != nil && !errors.Is(bad, io.EOF) {
				*err = bad
				return
			}
			at -= n
			rest = append(block, rest...)
			for {
				cut := bytes.LastIndexByte(rest, '\n')
				if cut < 0 {
					break
				}
				if finished && !yield(rest[cut+1:], at+int64(cut)+1) {
					return
				}
				rest, finished = rest[:cut], true
			}
			if len(rest) > maxLine {
				*err = fmt.Errorf("%s: a line of more than %d bytes", file.Name(), maxLine)
				return
			}
		}
		if finished {
			yield(rest, 0)
		}
	}
}

// Read returns the records that q selects, the oldest first. It reads files from
// their end, so what is new is found fast and what is rare is not.
func (l *Log) Read(ctx context.Context, q client.AuditQuery) ([]client.AuditRecord, error) {
	files, err := l.openAll()
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	defer func() {
		for _, f := range files {
			_ = f.Close() // only read
		}
	}()
	limit := q.Limit
	if limit <= 0 {
		limit = defaultLimit
	}
	found := []client.AuditRecord{}
	oldest := func() []client.AuditRecord { // in order; of those after q.After
		found = found[max(0, len(found)-limit):]
		slices.Reverse(found)
		return found
	}
	for _, file := range files {
		for line := range backward(file, &err) {
			r, bad := parse(line)
			if bad != nil {
				return nil, fmt.Errorf("read the audit log: %s: %w; see meshctl audit verify", file.Name(), bad)
			}
			if r.Seq <= q.After || !q.Since.IsZero() && r.Time.Before(q.Since) || q.After == 0 && len(found) == limit || ctx.Err() != nil {
				return oldest(), ctx.Err() //nolint:wrapcheck // the caller's own
			}
			if matches(&r, q) {
				if found = append(found, r); len(found) >= 2*limit {
					found = append(found[:0], found[len(found)-limit:]...)
				}
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
	}
	return oldest(), nil
}

func matches(r *client.AuditRecord, q client.AuditQuery) bool {
	ofKind := q.Kind == "" || r.Resource == q.Kind || slices.ContainsFunc(r.Changes, func(c client.AuditChange) bool { return string(c.Kind) == q.Kind })
	return ofKind && (q.Who == "" || q.Who == r.Who || q.Who == r.Title) &&
		(q.Outcome == "" || q.Outcome == r.Outcome) && (q.RequestID == "" || q.RequestID == r.RequestID)
}

// openAll opens the files, the newest first.
func (l *Log) openAll() (out []*os.File, err error) {
	l.files.RLock()
	defer l.files.RUnlock()
	names, err := list(l.config.Dir)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Backward(names) {
		file, err := os.Open(filepath.Join(l.config.Dir, name)) //nolint:gosec // the log's own file
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			for _, f := range out {
				_ = f.Close() // only read
			}
			return nil, err //nolint:wrapcheck // tells the path
		}
		out = append(out, file)
	}
	return out, nil
}
