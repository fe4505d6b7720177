package flow

import (
	"cmp"
	"slices"
	"time"
)

// Answer is one piece of the answer to a Query. There may be any number of them.
type Answer struct {
	// Records are in the order in which they ended, those of the past the newest
	// first.
	Records []Record `json:"records,omitempty"`
	// Sample answers Edges.
	Sample *Sample `json:"sample,omitempty"`
	// Stacks answers Stacks: the next part of a text.
	Stacks string `json:"stacks,omitempty"`
	// Dropped is how many records were left out since the answer before, because
	// whoever asked does not read fast enough.
	Dropped uint64 `json:"dropped,omitempty"`
	// Caught says that the records of the past are complete, and Kept how far they
	// reach back.
	Caught bool `json:"caught,omitempty"`
	Kept   Kept `json:"kept,omitzero"`
	// Hosts is how many hosts were asked, and Silent those that did not answer in
	// time.
	Hosts  int      `json:"hosts,omitempty"`
	Silent []string `json:"silent,omitempty"`
	// Done says that this was all. Error is why it is less than was asked for.
	Done  bool   `json:"done,omitempty"`
	Error string `json:"error,omitempty"`
}

// MaxRecords is how many records a piece that travels has at most.
const MaxRecords = 256

// Pieces cuts an answer so that none has more than MaxRecords records.
func (a Answer) Pieces() []Answer {
	var out []Answer
	for len(a.Records) > MaxRecords {
		out = append(out, Answer{Records: a.Records[:MaxRecords]})
		a.Records = a.Records[MaxRecords:]
	}
	return append(out, a)
}

// Kept tells what a proxy remembers of what it did not carry.
type Kept struct {
	// Records is how many it keeps of denials at most.
	Records int `json:"records"`
	// Since is the time of the oldest that is left; zero if none had to go.
	Since time.Time `json:"since,omitzero"`
}

// Worse returns what is left of both: the shorter memory.
func (k Kept) Worse(o Kept) Kept {
	if k.Records == 0 || o.Records != 0 && o.Records < k.Records {
		k.Records = o.Records
	}
	if k.Since.Before(o.Since) {
		k.Since = o.Since
	}
	return k
}

// Newest sorts records, the newest first, and returns at most limit of them; 0 is
// all.
func Newest(records []Record, limit int) []Record {
	slices.SortStableFunc(records, func(a, b Record) int {
		return cmp.Or(b.Time.Compare(a.Time), cmp.Compare(a.Node, b.Node), cmp.Compare(a.ErrorID, b.ErrorID))
	})
	if limit > 0 && len(records) > limit {
		records = records[:limit]
	}
	return records
}
