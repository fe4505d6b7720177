package docs_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/docs"
)

func TestTranscript(t *testing.T) {
	t.Parallel()
	got, err := docs.Transcript("$ a b\nout 1\n\nout 2\n$ c \\\n    --d  # exit 3: denied\n$ e # no status\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []docs.Step{
		{Line: 1, Command: "a b", Output: "out 1\n\nout 2\n"},
		{Line: 5, Command: "c \\\n    --d", Status: 3},
		{Line: 7, Command: "e # no status"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
	for _, text := range []string{"", "out\n$ a\n", "$ a \\\n", "$ a # exit 99999999999999999999\n"} {
		if steps, err := docs.Transcript(text); err == nil {
			t.Errorf("%q gives %+v, want an error", text, steps)
		}
	}
}

func TestMatches(t *testing.T) {
	t.Parallel()
	tests := []struct {
		want, got string
		matches   bool
	}{
		{"", "", true},
		{"", "a\n", false},
		{"a\n", "", false},
		{"a\n", "a\n\n", true},
		{"a  b\n", "a b  \n", true},
		{"a\nb\n", "a\nc\n", false},
		{"revision …: api …/2\n", "revision 8841: api 2/2\n", true},
		{"revision …: api …/2\n", "revision 8841: web 2/2\n", false},
		{"…\n", "", true},
		{"a\n…\nd\n", "a\nb\nc\nd\n", true},
		{"a\n…\nd\n", "a\nd\n", true},
		{"a\n…\nd\n", "a\nb\nc\n", false},
		{"…x…\n", "axb\n", true},
		{"ab…bc\n", "abc\n", false},
	}
	for _, tt := range tests {
		if got := docs.Matches(tt.want, tt.got); got != tt.matches {
			t.Errorf("Matches(%q, %q) = %t", tt.want, tt.got, got)
		}
	}
}
