package docs

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strings"
	"unicode"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`^#{1,6} +(.*?)[ #]*$`)
	code    = regexp.MustCompile("`[^`]*`")
)

// BrokenLinks returns what is wrong with the relative links of a page: no
// such file in fsys, or no such heading in it. Links to other sites are not
// followed.
func BrokenLinks(fsys fs.FS, page string) ([]string, error) {
	src, err := fs.ReadFile(fsys, page)
	if err != nil {
		return nil, err
	}
	var problems []string
	for number, line := range prose(string(src)) {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(line, ""), -1) {
			target := m[1]
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			if why := follow(fsys, page, target); why != "" {
				problems = append(problems, fmt.Sprintf("%s:%d: %s: %s", page, number, target, why))
			}
		}
	}
	return problems, nil
}

// follow says why a link cannot be followed, or "".
func follow(fsys fs.FS, page, target string) string {
	file, anchor, _ := strings.Cut(target, "#")
	name := page
	if file != "" {
		name = path.Join(path.Dir(page), file)
	}
	if !fs.ValidPath(name) {
		return "leads out of the repository"
	}
	if _, err := fs.Stat(fsys, name); err != nil {
		return "there is no such file"
	}
	if anchor == "" {
		return ""
	}
	text, err := fs.ReadFile(fsys, name)
	if err != nil {
		return err.Error()
	}
	for _, line := range prose(string(text)) {
		if h := heading.FindStringSubmatch(line); h != nil && Anchor(h[1]) == anchor {
			return ""
		}
	}
	return "there is no such heading"
}

// Anchor is the fragment that forges give a heading: lower case, blanks as
// hyphens, other punctuation left out.
func Anchor(title string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ' || r == '-':
			return '-'
		case r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		default:
			return -1
		}
	}, title)
}

// prose yields the lines outside fenced blocks, with their numbers from 1.
func prose(src string) func(yield func(int, string) bool) {
	return func(yield func(int, string) bool) {
		number, closing := 0, ""
		for line := range strings.Lines(src) {
			number++
			line = strings.TrimRight(line, "\r\n")
			f := fence.FindStringSubmatch(line)
			switch {
			case closing != "":
				if f != nil && f[3] == "" && strings.HasPrefix(f[2], closing) {
					closing = ""
				}
			case f != nil:
				closing = f[2]
			default:
				if !yield(number, line) {
					return
				}
			}
		}
	}
}
