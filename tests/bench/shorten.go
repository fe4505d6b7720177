package main

import (
	"fmt"
	"strings"
)

// spare marks what a configuration holds only for its weight.
const spare = "service-"

// short is a configuration for readers: one of each kind. Envoy's has no short
// form.
func (c config) short() string {
	if strings.HasPrefix(c.Text, "{") {
		return ""
	}
	return collapse(dropSpare(c.Text))
}

// dropSpare leaves out the blocks of services that are not loaded.
func dropSpare(text string) string {
	var out, block []string
	flush := func() {
		if !strings.Contains(strings.Join(block, "\n"), spare) {
			out = append(out, block...)
		}
		block = nil
	}
	for line := range strings.SplitSeq(text, "\n") {
		word := strings.TrimSpace(line)
		begins := strings.HasPrefix(word, "frontend ") || strings.HasPrefix(word, "backend ") ||
			strings.HasPrefix(word, "upstream ") || strings.HasPrefix(word, "server {")
		if begins || line == "}" {
			flush()
		}
		block = append(block, line)
	}
	flush()
	return strings.Join(out, "\n")
}

// collapse shortens runs of lines that differ only in an address.
func collapse(text string) string {
	lines := strings.Split(text, "\n")
	var out []string
	for i := 0; i < len(lines); {
		word, _, _ := strings.Cut(strings.TrimSpace(lines[i]), " ")
		end := i + 1
		for end < len(lines) && strings.HasPrefix(strings.TrimSpace(lines[end]), word+" ") {
			end++
		}
		repeats := word == "allow" || word == "server" || word == "bind"
		if !repeats || end-i < 3 {
			end = i + 1
		}
		out = append(out, lines[i])
		if n := end - i - 1; n > 0 {
			indent := lines[i][:len(lines[i])-len(strings.TrimLeft(lines[i], " "))]
			out = append(out, fmt.Sprintf("%s# … %d more", indent, n))
		}
		i = end
	}
	return strings.Join(out, "\n")
}
