package backup

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/store"
)

// Report is what can be said of a file.
type Report struct {
	Header Header
	Bytes  int64
	Chunks uint64
	// Verified says that every chunk was decrypted and authenticated. Without it the
	// checksum is right, which anybody can compute.
	Verified bool
	// Records counts what the snapshot holds, by kind; only if Verified.
	Records []Count
}

// Count is how many records of a kind there are.
type Count struct {
	Kind    string
	Records int
}

// Inspect reads a whole file and says whether it is intact. With the zero key it
// checks form, completeness and checksum; with the cluster's it decrypts every
// chunk and counts the records. The Report has the header, if that could be read,
// even with an error.
func Inspect(r io.Reader, key ca.ClusterKey) (Report, error) {
	if key.IsZero() {
		return skim(r)
	}
	in, err := newReader(r, key)
	if err != nil {
		return Report{}, err
	}
	out := func() Report { return Report{Header: in.header, Bytes: in.size, Chunks: in.count} }
	_, pairs, err := store.ReadDump(in)
	if err != nil {
		return out(), in.blame(err)
	}
	by := map[string]int{}
	for pair, err := range pairs {
		if err != nil {
			return out(), in.blame(err)
		}
		by[kindOf(pair.Key)]++
	}
	report := out()
	report.Verified = true
	for kind, n := range by {
		report.Records = append(report.Records, Count{Kind: kind, Records: n})
	}
	slices.SortFunc(report.Records, func(a, b Count) int { return cmp.Compare(a.Kind, b.Kind) })
	return report, nil
}

func skim(r io.Reader) (Report, error) {
	in, err := openChunks(r)
	if err != nil {
		return Report{}, fmt.Errorf("inspect: %w", err)
	}
	for err == nil {
		_, _, err = in.next()
	}
	report := Report{Header: in.header, Bytes: in.size, Chunks: in.count}
	if !errors.Is(err, io.EOF) {
		return report, err
	}
	return report, nil
}
