package docs

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A Step is one command of a transcript and what it is said to print.
type Step struct {
	Line    int    // in the snippet's text, from 1
	Command string // without "$ "; lines continued by a backslash are kept
	Status  int    // from a comment "# exit N" at the command's end; else 0
	Output  string // stdout and stderr as a terminal shows them
}

var exitStatus = regexp.MustCompile(`\s+#\s*exit ([0-9]+)\b[^\n]*$`)

// Transcript splits a console snippet into its steps.
func Transcript(text string) ([]Step, error) {
	var steps []Step
	number, continued := 0, false
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimRight(line, "\n")
		command, typed := strings.CutPrefix(line, "$ ")
		switch {
		case continued:
			last := &steps[len(steps)-1]
			last.Command += "\n" + line
			continued = strings.HasSuffix(line, "\\")
		case typed:
			steps = append(steps, Step{Line: number, Command: command})
			continued = strings.HasSuffix(line, "\\")
		case len(steps) == 0:
			return nil, fmt.Errorf("line %d: output before the first \"$ \" line", number)
		default:
			steps[len(steps)-1].Output += line + "\n"
		}
	}
	if len(steps) == 0 {
		return nil, fmt.Errorf("no line starts with \"$ \"")
	}
	if continued {
		return nil, fmt.Errorf("line %d: the last command is not complete", number)
	}
	for i := range steps {
		m := exitStatus.FindStringSubmatchIndex(steps[i].Command)
		if m == nil {
			continue
		}
		status, err := strconv.Atoi(steps[i].Command[m[2]:m[3]])
		if err != nil {
			return nil, fmt.Errorf("line %d: exit status: %w", steps[i].Line, err)
		}
		steps[i].Status = status
		steps[i].Command = steps[i].Command[:m[0]]
	}
	return steps, nil
}

// Matches compares what was printed with what a transcript says. In the
// latter … stands for any text within a line, and for any number of lines if
// it is alone on one. Runs of blanks are equal, as columns move with what
// they hold.
func Matches(want, got string) bool {
	return matchLines(lines(want), lines(got))
}

func lines(text string) []string {
	text = strings.TrimRight(text, "\n")
	if text == "" {
		return nil
	}
	all := strings.Split(text, "\n")
	for i, line := range all {
		all[i] = strings.Join(strings.Fields(line), " ")
	}
	return all
}

func matchLines(want, got []string) bool {
	for len(want) > 0 {
		if want[0] == "…" {
			for skip := range len(got) + 1 {
				if matchLines(want[1:], got[skip:]) {
					return true
				}
			}
			return false
		}
		if len(got) == 0 || !matchLine(want[0], got[0]) {
			return false
		}
		want, got = want[1:], got[1:]
	}
	return len(got) == 0
}

func matchLine(want, got string) bool {
	parts := strings.Split(want, "…")
	if len(parts) == 1 {
		return want == got
	}
	rest, ok := strings.CutPrefix(got, parts[0])
	if !ok {
		return false
	}
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(rest, part)
		if i < 0 {
			return false
		}
		rest = rest[i+len(part):]
	}
	return strings.HasSuffix(rest, parts[len(parts)-1])
}
