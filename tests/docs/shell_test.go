package docs_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/docs"
)

func TestCommands(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		script string
		want   [][]string
	}{
		"words":          {"meshctl get  services\n", [][]string{{"meshctl", "get", "services"}}},
		"no newline":     {"true", [][]string{{"true"}}},
		"empty":          {"\n  # only a comment\n", nil},
		"quotes":         {`a "b c" 'd "e"' f\ g "h\"i" ""`, [][]string{{"a", "b c", `d "e"`, "f g", `h"i`, ""}}},
		"joined quotes":  {`--http="GET /pub/*"'x'`, [][]string{{"--http=GET /pub/*x"}}},
		"comment":        {"a b#c # d 'e\nf", [][]string{{"a", "b#c"}, {"f"}}},
		"continued":      {"a \\\n  b\\\nc\n", [][]string{{"a", "bc"}}},
		"lists":          {"a && b || c; d & e | f\ng", [][]string{{"a"}, {"b"}, {"c"}, {"d"}, {"e"}, {"f"}, {"g"}}},
		"groups":         {"(a b); { c; }", [][]string{{"a", "b"}, {"c"}}},
		"braces in word": {"a {b,c} d{e}", [][]string{{"a", "{b,c}", "d{e}"}}},
		"redirections":   {"a >f 2>&1 b <g >> h &>i 3 < j", [][]string{{"a", "b", "3"}}},
		"here document":  {"cat <<EOF | b\nc $(d)\nEOF\ne", [][]string{{"cat"}, {"b"}, {"e"}}},
		"quoted here":    {"cat >f <<-'EOF'\n\tc\n\tEOF\ne", [][]string{{"cat"}, {"e"}}},
		"here string":    {"cat <<<word x", [][]string{{"cat", "x"}}},
		"prefixes":       {"sudo A=b env C=d meshctl check; if ! a; then b", [][]string{{"meshctl", "check"}, {"a"}, {"b"}}},
		"substitution": {
			`T=$(meshctl token join | cut -c1) a "x$(b (c) d)e"`,
			[][]string{{"meshctl", "token", "join"}, {"cut", "-c1"}, {"b"}, {"c"}, {"d"}, {"a", "x$(b (c) d)e"}},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := docs.Commands(tt.script)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("commands of %q (-want +got):\n%s", tt.script, diff)
			}
		})
	}
}

func TestCommandsRefuse(t *testing.T) {
	t.Parallel()
	for _, script := range []string{"a 'b", `a "b`, "a $(b", `"$(a "`} {
		if got, err := docs.Commands(script); err == nil {
			t.Errorf("%q gives %q, want an error", script, got)
		}
	}
}

func FuzzCommands(f *testing.F) {
	for _, seed := range []string{"a 'b' \"$(c)\" <<X\nd\nX\n", "a \\\n&& { b; } 2>&1 # c", "$($("} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, script string) {
		commands, err := docs.Commands(script)
		if err != nil {
			return
		}
		for _, c := range commands {
			if len(c) == 0 {
				t.Fatalf("%q holds a command without words", script)
			}
		}
	})
}
