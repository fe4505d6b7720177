package state

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/server/store"
)

const (
	// KeptEdits is how many changes of intentions are remembered at least. Older
	// ones go, a few records with each change; the parts of a large transaction one
	// after the other, the first one first.
	KeptEdits = 2_000
	// maxEditsPart bounds the bytes of one record.
	maxEditsPart = 64 << 10
	// maxForget is how many old records a transaction removes at most: it has to
	// fit beside what the transaction is for.
	maxForget = 2
)

// Author is who makes a change.
type Author struct {
	// ID is who that is for sure, such as "token:9f3a66f01b77c2d4".
	ID string `json:"id"`
	// Name is what people call it; "" if they don't.
	Name string `json:"name,omitempty"`
}

// String is the author's name for people.
func (a Author) String() string { return cmp.Or(a.Name, a.ID) }

// EditsKey numbers the transactions that changed intentions, in their order, and
// the parts of a large one.
type EditsKey struct {
	Number uint64
	Part   int
}

// Edits are changes of intentions that were made in one transaction, in which
// they are written.
type Edits struct {
	// Revision is that of the transaction when the record was carried into another
	// generation; see RevisionOf.
	Revision uint64    `json:"revision,omitempty"`
	At       time.Time `json:"at"`
	By       Author    `json:"by"`
	// Note is what the author's command was, where that is not plain.
	Note       string `json:"note,omitempty"`
	Intentions []Edit `json:"intentions"`
	// Total counts all edits since the first, these included.
	Total uint64 `json:"total"`
}

// Edit is one change of one intention. Before is absent if there was none, After
// if it was deleted; what was no JSON is a string of it.
type Edit struct {
	Key    string          `json:"key"` // see KeyText
	Before json.RawMessage `json:"before,omitempty"`
	After  json.RawMessage `json:"after,omitempty"`
}

// RevisionOf returns the revision at which a record's transaction was committed,
// whatever became of the generation since. It is what people name the change by.
func RevisionOf(rec Record[Edits]) uint64 { return cmp.Or(rec.Value.Revision, rec.Revision) }

// NewestEdits yields the records of changes, the newest first.
func (s *Snapshot) NewestEdits() iter.Seq2[EditsKey, Record[Edits]] {
	return func(yield func(EditsKey, Record[Edits]) bool) {
		it := s.tree.Root().ReverseIterator()
		it.SeekPrefix([]byte(IntentionEdits.prefix()))
		for _, value, ok := it.Previous(); ok; _, value, ok = it.Previous() {
			if e, is := value.(*entry[EditsKey, Edits]); is && !yield(e.key, e.Record) {
				return
			}
		}
	}
}

// Sign says who makes the changes of the transaction and when, for the history of
// intentions. A transaction that nobody signed is the server's own.
func (tx *Tx) Sign(by Author, at time.Time, note string) {
	tx.by, tx.at, tx.note = by, at.UTC(), note
}

// recordEdits adds the history of the intentions that the transaction changes. At
// most forget old records are removed.
func (tx *Tx) recordEdits(forget int) error {
	var edits []Edit
	for _, key := range tx.order {
		text, is := strings.CutPrefix(key, Intentions.prefix())
		if w := tx.writes[key]; is && !tx.holdsAlready(key, w) {
			edit := Edit{Key: text}
			if before, exists := tx.base.raw(key); exists {
				edit.Before = asJSON(before)
			}
			if !w.delete {
				edit.After = asJSON(w.raw)
			}
			edits = append(edits, edit)
		}
	}
	if len(edits) == 0 {
		return nil
	}
	number, total := uint64(1), uint64(0)
	for key, rec := range tx.base.NewestEdits() {
		if number = max(number, key.Number+1); rec.Err == nil {
			total = rec.Value.Total
			break
		}
	}
	if tx.by == (Author{}) {
		tx.Sign(Author{ID: "server"}, time.Now(), "")
	}
	for part := 0; len(edits) > 0; part++ {
		n := inPart(edits)
		total += uint64(n) //nolint:gosec // a length
		e := Edits{At: tx.at, By: tx.by, Note: tx.note, Intentions: edits[:n], Total: total}
		if err := IntentionEdits.Put(tx, EditsKey{Number: number, Part: part}, e); err != nil {
			return err
		}
		edits = edits[n:]
	}
	for key, rec := range IntentionEdits.All(tx.base) {
		if forget == 0 || total < rec.Value.Total+KeptEdits {
			break
		}
		if forget--; tx.Size() < store.MaxKeys || forget > maxForget {
			IntentionEdits.Delete(tx, key)
		}
	}
	return nil
}

// inPart is how many of the edits one record takes: at least one.
func inPart(edits []Edit) int {
	size := 0
	for n, e := range edits {
		size += len(e.Key) + len(e.Before) + len(e.After)
		if n > 0 && size > maxEditsPart {
			return n
		}
	}
	return len(edits)
}

func asJSON(raw []byte) json.RawMessage {
	if json.Valid(raw) {
		return bytes.Clone(raw)
	}
	text, _ := json.Marshal(string(raw)) // strings always can be
	return text
}

// Carry passes pairs on that are to be the content of another generation. There
// every key has another revision; those that people know stay with their changes.
func Carry(pairs iter.Seq2[store.Pair, error]) iter.Seq2[store.Pair, error] {
	return func(yield func(store.Pair, error) bool) {
		for pair, err := range pairs {
			if err == nil && strings.HasPrefix(pair.Key, IntentionEdits.prefix()) {
				pair.Value = withRevision(pair)
			}
			if !yield(pair, err) {
				return
			}
		}
	}
}

// withRevision writes the revision into a record that has none. One that can't be
// read stays as it is.
func withRevision(pair store.Pair) []byte {
	var fields map[string]json.RawMessage // a newer version's too
	if json.Unmarshal(pair.Value, &fields) != nil || fields == nil || fields["revision"] != nil {
		return pair.Value
	}
	fields["revision"] = json.RawMessage(strconv.FormatUint(pair.ModRevision, 10))
	raw, err := json.Marshal(fields)
	if err != nil {
		return pair.Value
	}
	return raw
}

func encodeEdits(k EditsKey) []string {
	return []string{fmt.Sprintf("%016x", k.Number), fmt.Sprintf("%06x", k.Part)}
}

func decodeEdits(s []string) (EditsKey, error) {
	if err := want(s, 2); err != nil {
		return EditsKey{}, err
	}
	number, err := strconv.ParseUint(s[0], 16, 64)
	if err != nil {
		return EditsKey{}, fmt.Errorf("%w: %w", errKey, err)
	}
	part, err := strconv.ParseUint(s[1], 16, 31)
	if err != nil {
		return EditsKey{}, fmt.Errorf("%w: %w", errKey, err)
	}
	return EditsKey{Number: number, Part: int(part)}, nil
}

// unlimited is for a transaction of any size.
const unlimited = math.MaxInt
