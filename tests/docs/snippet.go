// Package docs holds the documentation to the code: every fenced block of
// README.md and docs/ is parsed or run, and every relative link leads
// somewhere.
//
// What a block is checked against is told by its info string:
//
//	hcl, yaml, json  a file: the first comment line may name it ("# server.hcl"),
//	                 for JSON the info string does ("json server.json"); a file
//	                 without a name is a manifest, "json api" any JSON
//	console          a transcript: "$ command" lines and what they print
//	sh               commands to type: syntax, and the flags of our programs
//	go               a Go file or declarations
//	text             anything else: not checked, so not for what can be
//
// A comment before a block, or at the top of a page, changes how transcripts
// are run; see [Directive].
package docs

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// A Snippet is one fenced block of a page.
type Snippet struct {
	Page string // path of the page
	Line int    // of the fence, from 1
	Lang string // first word of the info string
	// Name is the file's name: the rest of the info string, or what the first
	// comment line starts with; "" if neither names a file.
	Name      string
	Directive Directive
	Host      string // with On
	Text      string // ends with a newline unless empty
}

// Where is the snippet's place for a message.
func (s Snippet) Where() string { return fmt.Sprintf("%s:%d", s.Page, s.Line) }

// A Directive is an HTML comment of the form <!-- test: WORD -->, for On
// <!-- test: on HOST -->, and says how the transcripts that follow it are run.
type Directive string

// The directives.
const (
	Sandbox Directive = ""      // the default: run in a folder with the page's named files and nothing else
	Dev     Directive = "dev"   // the rest of the page: the same, beside one `meshd dev`
	Parse   Directive = "parse" // the next block: only check the commands; for what takes several machines
	On      Directive = "on"    // the next block: the same here; tests/e2e runs it on a machine of that name
)

var (
	fence     = regexp.MustCompile("^( *)(`{3,}|~{3,})[ \t]*([^`]*?)[ \t]*$")
	directive = regexp.MustCompile(`^<!-- test: (\S+)(?: (\S+))? -->$`)
	listItem  = regexp.MustCompile(`^ {0,3}([-*+]|[0-9]+[.)]) `)
	fileName  = regexp.MustCompile(`^(?:#|//)\s*(\S+\.(?:hcl|yaml|json))(?:[\s:,;].*)?$`)
)

// Snippets returns the fenced blocks of a page in their order. It is an error
// if a fence has no info string or is never closed, if code is indented
// rather than fenced (nothing would say what it is), or if a directive is
// unknown.
func Snippets(page, src string) ([]Snippet, error) {
	var (
		snippets []Snippet
		open     *Snippet
		closing  string // the fence that opened the block
		indent   string // before it
		body     strings.Builder
		dev      bool
		next     Directive
		host     string // of next
		list     bool   // inside a list, where indented lines are text
		blank    = true
	)
	number := 0
	for raw := range strings.Lines(src) {
		number++
		line := strings.TrimRight(raw, "\r\n")
		if open != nil {
			if f := fence.FindStringSubmatch(line); f != nil && f[3] == "" && strings.HasPrefix(f[2], closing) {
				open.Text = body.String()
				if open.Name == "" {
					open.Name = nameOf(open.Text)
				}
				snippets = append(snippets, *open)
				open = nil
				blank = true
				continue
			}
			body.WriteString(strings.TrimPrefix(line, indent) + "\n")
			continue
		}
		if f := fence.FindStringSubmatch(line); f != nil {
			lang, name, _ := strings.Cut(f[3], " ")
			if lang == "" {
				return nil, fmt.Errorf("%s:%d: the fence has no info string that says what the block is", page, number)
			}
			open = &Snippet{Page: page, Line: number, Lang: lang, Name: strings.TrimSpace(name), Directive: next, Host: host}
			if next == Sandbox && dev {
				open.Directive = Dev
			}
			indent, closing, next, host = f[1], f[2], Sandbox, ""
			body.Reset()
			continue
		}
		if d := directive.FindStringSubmatch(strings.TrimSpace(line)); d != nil {
			switch word := Directive(d[1]); {
			case word == Dev && d[2] == "":
				dev = true
			case word == Parse && d[2] == "", word == On && d[2] != "":
				next, host = word, d[2]
			default:
				return nil, fmt.Errorf("%s:%d: unknown directive %q: dev, parse or on HOST", page, number, strings.TrimSpace(d[1]+" "+d[2]))
			}
		}
		indented := strings.HasPrefix(line, "    ") || strings.HasPrefix(line, "\t")
		if strings.TrimSpace(line) == "" {
			blank = true
			continue
		}
		if indented && blank && !list {
			return nil, fmt.Errorf("%s:%d: indented code: fence it and say what it is", page, number)
		}
		if !indented {
			list = listItem.MatchString(line) || list && !blank
		}
		blank = false
	}
	if open != nil {
		return nil, fmt.Errorf("%s:%d: the fence is never closed", page, open.Line)
	}
	return snippets, nil
}

// nameOf returns the file name that the first line of a text starts with, if
// that line is a comment.
func nameOf(text string) string {
	first, _, _ := strings.Cut(text, "\n")
	if m := fileName.FindStringSubmatch(first); m != nil {
		return m[1]
	}
	return ""
}

// A Schema says how a file of the documentation is decoded.
type Schema string

// The kinds of file that people write.
const (
	Manifest Schema = "manifest"
	Services Schema = "services"
	Server   Schema = "server"
	Agent    Schema = "agent"
	API      Schema = "api" // JSON of the HTTP API: any well-formed value
)

// Schema is what a snippet in hcl, yaml or json holds, told by its name.
func (s Snippet) Schema() Schema {
	base := path.Base(s.Name)
	switch strings.TrimSuffix(base, path.Ext(base)) {
	case "server":
		return Server
	case "agent":
		return Agent
	}
	switch {
	case path.Base(path.Dir(s.Name)) == "services.d":
		return Services
	case s.Lang == "json" && s.Name == "api":
		return API
	default:
		return Manifest
	}
}

// File is the name under which a snippet's decoder sees it: it carries the
// form, as names of files do.
func (s Snippet) File() string {
	base := path.Base(s.Name)
	if path.Ext(base) == "."+s.Lang && !strings.ContainsAny(base, "*?") {
		return base
	}
	return "snippet." + s.Lang
}
