package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/server/client"
)

const (
	// current is the file that is written; finished ones are called audit-SEQ.jsonl,
	// with the number of their first record in 20 digits.
	current  = "audit.jsonl"
	finished = "audit-"
	ending   = ".jsonl"
	torn     = "torn-*" // what was behind the last record after a crash
)

// fatalError is one after which nobody knows what is on the disk.
type fatalError struct{ error }

func (e *fatalError) Unwrap() error { return e.error }

// writer writes the files. It is used by one goroutine.
type writer struct {
	log   *Log
	file  *os.File
	size  int64
	first uint64 // number of the first record of file
	head  head
	held  int // records with a place that are written and not synced
}

// open continues the chain where it ends. An unfinished record, which a crash has
// left, is put aside.
func (l *Log) open() (*writer, error) {
	dir := l.config.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err //nolint:wrapcheck // the caller says what for
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o077 != 0 {
		return nil, errors.Join(err, fmt.Errorf("%s is open to others: run chmod 0700 %s", dir, dir))
	}
	w := &writer{log: l}
	cut, err := w.findHead(dir)
	if err != nil {
		return nil, err
	}
	if err := w.create(); err != nil {
		return nil, err
	}
	var begin []client.AuditRecord
	if cut > 0 {
		begin = append(begin, client.AuditRecord{Event: client.AuditRecovered, Count: uint64(cut), Detail: "bytes of an unfinished record, put aside in a file beside the log"})
	}
	if err := w.append(append(begin, client.AuditRecord{Event: client.AuditOpened, Detail: "format 1"})); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.head = w.head
	l.mu.Unlock()
	return w, w.sync()
}

// findHead looks for the newest record, and returns how many bytes behind it were
// taken away.
func (w *writer) findHead(dir string) (cut int64, err error) {
	names, err := list(dir)
	if err != nil {
		return 0, err
	}
	for _, name := range slices.Backward(names) {
		path := filepath.Join(dir, name)
		record, line, end, err := last(path)
		if err != nil {
			return 0, err
		}
		info, err := os.Stat(path)
		if err != nil {
			return 0, err //nolint:wrapcheck // tells the path
		}
		if name == current && end < info.Size() {
			if cut, err = putAside(path, end); err != nil {
				return 0, err
			}
		} else if end < info.Size() {
			return 0, fmt.Errorf("%s was finished, and does not end with a record: look at it with meshctl audit verify %s, and move the folder away to begin anew", path, dir)
		}
		if line != nil {
			w.head = head{seq: record.Seq, sum: sum(line)}
			return cut, nil
		}
	}
	return cut, nil
}

// putAside moves what is behind end into a file of its own.
func putAside(path string, end int64) (int64, error) {
	data, err := os.ReadFile(path) //nolint:gosec // the log's own file
	if err != nil {
		return 0, err //nolint:wrapcheck // tells the path
	}
	file, err := os.CreateTemp(filepath.Dir(path), torn) // mode 0600
	if err != nil {
		return 0, err //nolint:wrapcheck // tells the path
	}
	_, err = file.Write(data[end:])
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return 0, err
	}
	return int64(len(data)) - end, os.Truncate(path, end)
}

// create opens the current file, which may be new, to append to it.
func (w *writer) create() error {
	path := filepath.Join(w.log.config.Dir, current)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600) //nolint:gosec // the log's own file
	if err != nil {
		return err //nolint:wrapcheck // tells the path
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	w.file, w.size, w.first = file, info.Size(), w.head.seq+1
	if w.size > 0 {
		record, err := first(path)
		if err != nil {
			return errors.Join(err, file.Close())
		}
		w.first = record.Seq
	}
	return syncDir(w.log.config.Dir)
}

// append writes records as one piece, or nothing.
func (w *writer) append(records []client.AuditRecord) error {
	if w.size >= w.log.config.FileBytes && w.size > 0 {
		if err := w.rotate(); err != nil {
			return err
		}
	}
	var lines []byte
	h, held := w.head, 0
	for _, r := range records {
		if r.Event == "" {
			r.Event = client.AuditRequest
			held++
		}
		if r.Time.IsZero() {
			r.Time = time.Now()
		}
		r.Time, r.Server = r.Time.UTC(), w.log.config.Server
		line, after, err := h.next(r, w.log.config.Key)
		if err != nil {
			return err
		}
		lines, h = append(lines, line...), after
	}
	if _, err := w.file.Write(lines); err != nil {
		if undo := w.file.Truncate(w.size); undo != nil {
			return &fatalError{errors.Join(err, undo)}
		}
		return err //nolint:wrapcheck // tells the path
	}
	w.size, w.head, w.held = w.size+int64(len(lines)), h, w.held+held
	return nil
}

func (w *writer) sync() error {
	if err := w.file.Sync(); err != nil {
		return &fatalError{err}
	}
	return nil
}

// rotate finishes the current file, begins another, and removes the oldest. What
// is removed is told in the new file first.
func (w *writer) rotate() error {
	if err := w.sync(); err != nil {
		return err
	}
	dir := w.log.config.Dir
	w.log.files.Lock()
	defer w.log.files.Unlock()
	if err := os.Rename(filepath.Join(dir, current), filepath.Join(dir, fmt.Sprintf("%s%020d%s", finished, w.first, ending))); err != nil {
		return err //nolint:wrapcheck // tells the path
	}
	if err := w.file.Close(); err != nil {
		return &fatalError{err}
	}
	if err := w.create(); err != nil {
		return &fatalError{err}
	}
	return w.prune(dir)
}

func (w *writer) prune(dir string) error {
	names, err := list(dir)
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return n == current })
	old := len(names) - w.log.config.Files
	if old <= 0 {
		return nil
	}
	end := w.first - 1 // if nothing finished is kept
	if old < len(names) {
		end = numberOf(names[old]) - 1
	}
	told := []client.AuditRecord{{Event: client.AuditRemoved, Count: end, Detail: "records up to this number are removed with the oldest files"}}
	if err := errors.Join(w.append(told), w.sync()); err != nil {
		return err
	}
	for _, name := range names[:old] {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err //nolint:wrapcheck // tells the path
		}
	}
	return nil
}

// list returns the names of the log's files, the oldest first.
func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err //nolint:wrapcheck // tells the path
	}
	var out []string
	for _, e := range entries {
		if numberOf(e.Name()) > 0 {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	if _, err := os.Stat(filepath.Join(dir, current)); err == nil {
		out = append(out, current)
	}
	return out, nil
}

// numberOf is the number in the name of a finished file; 0 if it is none.
func numberOf(name string) uint64 {
	text, ok := strings.CutPrefix(strings.TrimSuffix(name, ending), finished)
	n, err := strconv.ParseUint(text, 10, 64)
	if !ok || err != nil || len(text) != 20 {
		return 0
	}
	return n
}

// last returns the newest record of a file, its line, and where that ends. A file
// without a record has no line.
func last(path string) (record client.AuditRecord, line []byte, end int64, err error) {
	file, err := os.Open(path) //nolint:gosec // the log's own file
	if err != nil {
		return record, nil, 0, err //nolint:wrapcheck // tells the path
	}
	defer func() { _ = file.Close() }() // only read
	for l, at := range backward(file, &err) {
		record, bad := parse(l)
		if bad == nil {
			return record, bytes.Clone(l), at + int64(len(l)) + 1, nil
		}
	}
	return record, nil, 0, err
}

func first(path string) (client.AuditRecord, error) {
	file, err := os.Open(path) //nolint:gosec // the log's own file
	if err != nil {
		return client.AuditRecord{}, err //nolint:wrapcheck // tells the path
	}
	defer func() { _ = file.Close() }() // only read
	lines := scan(file)
	if !lines.Scan() {
		return client.AuditRecord{}, errors.Join(lines.Err(), fmt.Errorf("%s holds no record", path))
	}
	return parse(lines.Bytes())
}

func syncDir(path string) error {
	dir, err := os.Open(path) //nolint:gosec // the log's own folder
	if err != nil {
		return err //nolint:wrapcheck // tells the path
	}
	return errors.Join(dir.Sync(), dir.Close())
}
