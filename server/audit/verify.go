package audit

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
)

// ErrBroken is wrapped when files are not what was written.
var ErrBroken = errors.New("the audit log was changed")

// Report is what Verify found.
type Report struct {
	Server string `json:"server"`
	Files  int    `json:"files"`
	// First and Last are the numbers of the records that are there; From and To
	// their times.
	First uint64    `json:"first"`
	Last  uint64    `json:"last"`
	From  time.Time `json:"from"`
	To    time.Time `json:"to"`
	// Signed says that each record was signed with the key. Without a key only the
	// chain was followed, which whoever can write the files can compute.
	Signed bool `json:"signed"`
	// Closed says that the last record is the regular end of a run. What was cut off
	// behind it, or behind any other record, can't be seen in the files.
	Closed bool `json:"closed"`
	// Unfinished is how many bytes follow the last record: one that is being
	// written, or that a crash has left.
	Unfinished int `json:"unfinished,omitempty"`
}

// Verify follows the chain of a folder of files, or of one file. With a key it
// proves that each record was written by who has it. The error wraps ErrBroken and
// names the file and line of the first record that is not as it was written, or
// tells that the file can't be read.
func Verify(path string, key ca.Secret) (Report, error) {
	files := []string{path}
	info, err := os.Stat(path)
	if err != nil {
		return Report{}, err //nolint:wrapcheck // tells the path
	}
	if info.IsDir() {
		names, err := list(path)
		if err != nil {
			return Report{}, err
		}
		files = nil
		for _, name := range names {
			files = append(files, filepath.Join(path, name))
		}
	}
	c := &chain{key: key}
	c.report.Signed = !key.IsZero()
	for i, file := range files {
		if err := c.file(file, i == len(files)-1); err != nil {
			return c.report, err
		}
	}
	if c.report.Last == 0 {
		return c.report, fmt.Errorf("%s holds no audit log", path)
	}
	return c.report, c.begin(files[0])
}

// chain follows records.
type chain struct {
	key     ca.Secret
	head    head
	report  Report
	removed uint64 // the highest number that a record says was removed
}

func (c *chain) file(path string, newest bool) error {
	data, err := os.ReadFile(path) //nolint:gosec // the caller names it
	if err != nil {
		return err //nolint:wrapcheck // tells the path
	}
	c.report.Files++
	number := 0
	for len(data) > 0 {
		number++
		line, rest, finished := cutLine(data)
		if !finished {
			if !newest {
				return fmt.Errorf("%w: %s:%d: it is cut off in the middle of a record", ErrBroken, path, number)
			}
			c.report.Unfinished = len(line)
			return nil
		}
		if err := c.line(line); err != nil {
			return fmt.Errorf("%w: %s:%d: %w", ErrBroken, path, number, err)
		}
		data = rest
	}
	return nil
}

func cutLine(data []byte) (line, rest []byte, finished bool) {
	for i, b := range data {
		if b == '\n' {
			return data[:i], data[i+1:], true
		}
	}
	return data, nil, false
}

func (c *chain) line(line []byte) error {
	r, err := parse(line)
	if err != nil {
		return err
	}
	if !c.key.IsZero() && !authentic(line, c.key) {
		return fmt.Errorf("record %d was changed, inserted, or signed with another key", r.Seq)
	}
	known := c.report.Last > 0
	switch {
	case known && r.Seq > c.head.seq+1:
		return fmt.Errorf("records %d to %d are missing before it", c.head.seq+1, r.Seq-1)
	case known && r.Seq <= c.head.seq:
		return fmt.Errorf("record %d stands where %d belongs: it was inserted or moved", r.Seq, c.head.seq+1)
	case known && r.Prev != hex.EncodeToString(c.head.sum[:]):
		return fmt.Errorf("record %d does not follow the line before it: one of the two was changed", r.Seq)
	case known && r.Server != c.report.Server:
		return fmt.Errorf("record %d is of server %s, those before are of %s", r.Seq, r.Server, c.report.Server)
	case r.Seq == 1 && r.Prev != strings.Repeat("0", 64):
		return fmt.Errorf("record 1 names a line before it: it was changed")
	}
	if !known {
		c.report.Server, c.report.First, c.report.From = r.Server, r.Seq, r.Time
	}
	if r.Event == client.AuditRemoved {
		c.removed = max(c.removed, r.Count)
	}
	c.head = head{seq: r.Seq, sum: sum(line)}
	c.report.Last, c.report.To, c.report.Closed = r.Seq, r.Time, r.Event == client.AuditClosed
	return nil
}

// begin checks that what is missing before the first record was removed by the
// log itself.
func (c *chain) begin(path string) error {
	if first := c.report.First; first > c.removed+1 {
		return fmt.Errorf("%w: %s:1: records 1 to %d are missing before it, and no record tells that the log has removed them", ErrBroken, path, first-1)
	}
	return nil
}
