package http1

import "bytes"

// lines walks the lines of one head or trailer section.
type lines struct {
	buf []byte
	pos int
	lim *Limits
	// underscore admits it in names, whatever the limits say.
	underscore bool
}

// next returns the next line without its CRLF, or ErrShort.
func (l *lines) next(tooLong *Error) ([]byte, error) {
	rest := l.buf[l.pos:]
	end := bytes.IndexByte(rest, '\n')
	if end < 0 {
		// A CR that is not the last byte so far will not become a CRLF.
		if cr := bytes.IndexByte(rest, '\r'); cr >= 0 && cr < len(rest)-1 {
			return nil, errCR
		}
		if len(rest) > l.lim.LineBytes+1 {
			return nil, tooLong
		}
		if len(l.buf) >= l.lim.HeadBytes {
			return nil, errHeadLong
		}
		return nil, ErrShort
	}
	if end == 0 || rest[end-1] != '\r' {
		return nil, errBareLF
	}
	if end-1 > l.lim.LineBytes {
		return nil, tooLong
	}
	if l.pos+end+1 > l.lim.HeadBytes {
		return nil, errHeadLong
	}
	l.pos += end + 1
	return rest[:end-1], nil
}

// skim walks on over whole lines from a place where a line begins, without
// parsing them, and reports whether the section's end is there. So a head
// that comes in drips is parsed twice at most.
func (l *lines) skim() error {
	for {
		line, err := l.next(errLineLong)
		if err != nil {
			return err
		}
		if len(line) == 0 {
			return nil
		}
	}
}

// field parses one field line.
func (l *lines) field(line []byte, fields Fields) (Fields, error) {
	if line[0] == ' ' || line[0] == '\t' {
		return fields, errFold
	}
	if len(fields) >= l.lim.Fields {
		return fields, errFields
	}
	colon := 0
	underscore := false
	for colon < len(line) {
		c := line[colon]
		if chars[c]&isToken == 0 {
			break
		}
		underscore = underscore || c == '_'
		colon++
	}
	switch {
	case colon == len(line):
		return fields, errNoColon
	case line[colon] != ':':
		if c := line[colon]; colon > 0 && (c == ' ' || c == '\t') && bytes.IndexByte(line, ':') > 0 {
			return fields, errNameSpace
		}
		return fields, errName
	case colon == 0:
		return fields, errName
	case underscore && !l.underscore && !l.lim.AllowUnderscore:
		return fields, errUnderscore
	}
	value := trim(line[colon+1:])
	if !validValue(value) {
		return fields, errValue
	}
	name := line[:colon]
	return append(fields, Field{Name: name, Value: value, ID: lookup(name)}), nil
}
