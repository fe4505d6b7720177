package docs

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Commands splits a shell script into its simple commands, each as the words
// that the program would be given: quotes removed, redirections, here
// documents, assignments and comments left out, commands inside $( ) included
// on their own. Variables stay as they are written.
//
// It knows the part of the language that documentation uses, not all of it.
func Commands(script string) ([][]string, error) {
	s := &splitter{in: script}
	if err := s.run(); err != nil {
		return nil, err
	}
	return s.commands, nil
}

type splitter struct {
	in       string
	pos      int
	commands [][]string
	words    []string
	word     strings.Builder
	started  bool     // a word is being built, perhaps an empty quoted one
	redirect bool     // the next word names a file
	heredoc  []string // words that end here documents which begin after this line
	wantsEnd bool     // the next word is one of these
}

var (
	assignment = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)
	errQuote   = errors.New("a quote is never closed")
)

func (s *splitter) run() error {
	for s.pos < len(s.in) {
		c := s.in[s.pos]
		switch {
		case c == '\\' && strings.HasPrefix(s.in[s.pos:], "\\\n"):
			s.pos += 2
		case c == '\\' && s.pos+1 < len(s.in):
			s.put(s.in[s.pos+1 : s.pos+2])
			s.pos += 2
		case c == '\'' || c == '"':
			if err := s.quoted(c); err != nil {
				return err
			}
		case strings.HasPrefix(s.in[s.pos:], "$("):
			if err := s.substitution(); err != nil {
				return err
			}
		case c == '#' && !s.started:
			s.pos += lineEnd(s.in[s.pos:])
		case c == '\n':
			s.endCommand()
			s.pos++
			s.skipHeredocs()
		case c == ' ' || c == '\t':
			s.endWord()
			s.pos++
		case c == '<' || c == '>':
			s.redirection()
		case c == '&' && strings.HasPrefix(s.in[s.pos:], "&>"):
			s.endWord()
			s.pos++
		case strings.IndexByte(";&|()", c) >= 0:
			s.endCommand()
			s.pos++
		default:
			s.put(s.in[s.pos : s.pos+1])
			s.pos++
		}
	}
	s.endCommand()
	return nil
}

func lineEnd(s string) int {
	if i := strings.IndexByte(s, '\n'); i >= 0 {
		return i
	}
	return len(s)
}

func (s *splitter) put(text string) {
	s.started = true
	s.word.WriteString(text)
}

func (s *splitter) quoted(quote byte) error {
	s.started = true
	for s.pos++; s.pos < len(s.in); s.pos++ {
		c := s.in[s.pos]
		switch {
		case c == quote:
			s.pos++
			return nil
		case quote == '"' && c == '\\' && s.pos+1 < len(s.in) && strings.IndexByte("\"\\$`", s.in[s.pos+1]) >= 0:
			s.pos++
			s.word.WriteByte(s.in[s.pos])
		case quote == '"' && strings.HasPrefix(s.in[s.pos:], "$("):
			if err := s.substitution(); err != nil {
				return err
			}
			s.pos--
		default:
			s.word.WriteByte(c)
		}
	}
	return errQuote
}

// substitution enters the commands of $( ) and leaves it in the word as text.
func (s *splitter) substitution() error {
	depth := 0
	for end := s.pos + 1; end < len(s.in); end++ {
		switch s.in[end] {
		case '(':
			depth++
		case ')':
			depth--
		}
		if depth == 0 {
			inner, err := Commands(s.in[s.pos+2 : end])
			if err != nil {
				return err
			}
			s.commands = append(s.commands, inner...)
			s.put(s.in[s.pos : end+1])
			s.pos = end + 1
			return nil
		}
	}
	return fmt.Errorf("$( is never closed: %q", s.in[s.pos:])
}

func (s *splitter) redirection() {
	// Digits right before the operator are a file descriptor.
	if s.started && strings.Trim(s.word.String(), "0123456789") == "" {
		s.word.Reset()
		s.started = false
	}
	s.endWord()
	rest := s.in[s.pos:]
	switch {
	case strings.HasPrefix(rest, "<<<"):
		s.pos += 3
	case strings.HasPrefix(rest, "<<"):
		s.pos += 2
		if strings.HasPrefix(s.in[s.pos:], "-") {
			s.pos++
		}
		s.wantsEnd = true
	case strings.HasPrefix(rest, ">>"), strings.HasPrefix(rest, ">&"), strings.HasPrefix(rest, "<&"):
		s.pos += 2
	default:
		s.pos++
	}
	s.redirect = true
}

func (s *splitter) endWord() {
	if !s.started {
		return
	}
	word := s.word.String()
	s.word.Reset()
	s.started = false
	switch {
	case s.wantsEnd:
		s.heredoc = append(s.heredoc, word)
	case s.redirect:
	case len(s.words) == 0 && (assignment.MatchString(word) || precedes(word)):
	default:
		s.words = append(s.words, word)
	}
	s.redirect, s.wantsEnd = false, false
}

// precedes reports whether a word stands before a command rather than being one.
func precedes(word string) bool {
	switch word {
	case "{", "}", "sudo", "exec", "time", "env", "!", "if", "then", "else", "elif", "while", "until", "do":
		return true
	default:
		return false
	}
}

func (s *splitter) endCommand() {
	s.endWord()
	if len(s.words) > 0 {
		s.commands = append(s.commands, s.words)
	}
	s.words = nil
}

// skipHeredocs leaves out the texts whose operators stood on the line before.
func (s *splitter) skipHeredocs() {
	for _, end := range s.heredoc {
		for s.pos < len(s.in) {
			n := lineEnd(s.in[s.pos:])
			line := s.in[s.pos : s.pos+n]
			s.pos = min(s.pos+n+1, len(s.in))
			if strings.TrimLeft(line, "\t") == end {
				break
			}
		}
	}
	s.heredoc = nil
}
