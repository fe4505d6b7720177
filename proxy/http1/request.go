package http1

import "bytes"

// Request is the head of a request, as it was received. The zero value is
// ready; one value parses any number of heads, one after the other, and keeps
// its field list's memory. All slices are views into the buffer given to Parse.
type Request struct {
	Method []byte
	// Target is the whole request target; Path and RawQuery are its parts in
	// origin form. For OPTIONS * Path is the star.
	Target   []byte
	Path     []byte
	RawQuery []byte
	HasQuery bool
	// Absolute says that the target was an absolute http or https URL whose
	// host is the one of Host.
	Absolute bool
	// Host is the Host field's value; empty only in HTTP/1.0.
	Host []byte
	// Minor is the minor version, 0 or 1.
	Minor uint8
	// Chunked says that the body is chunked. Otherwise Length is its length,
	// 0 without Content-Length.
	Chunked bool
	Length  int64
	// KeepAlive says that the client wants to send more requests.
	KeepAlive bool
	// ExpectContinue says that the client waits for a 100 before its body.
	ExpectContinue bool
	// WebSocket says that the client asks to switch to websocket.
	WebSocket bool
	// Fields has every field line as received; see [Request.EndToEnd].
	Fields Fields

	scanned int
	options options
}

// Reset forgets the head, not the memory.
func (r *Request) Reset() { *r = Request{Fields: r.Fields[:0]} }

// Parse parses the head at the beginning of buf and returns its length. With
// [ErrShort] buf holds a proper beginning: call again with the same bytes and
// more, in the same buffer or another. Any other error is an *[Error]. lim must
// have its defaults filled in.
func (r *Request) Parse(buf []byte, lim *Limits) (int, error) {
	l := lines{buf: buf, pos: r.scanned, lim: lim}
	if r.scanned > 0 {
		if err := l.skim(); err != nil {
			r.scanned = l.pos
			return 0, err
		}
		l.pos = 0
	}
	r.Reset()
	line, err := l.next(errTargetLong)
	if err != nil {
		return 0, err
	}
	if err := r.requestLine(line); err != nil {
		return 0, err
	}
	for {
		line, err := l.next(errLineLong)
		if err != nil {
			r.scanned = l.pos
			return 0, err
		}
		if len(line) == 0 {
			break
		}
		if r.Fields, err = l.field(line, r.Fields); err != nil {
			return 0, err
		}
	}
	if err := r.interpret(); err != nil {
		return 0, err
	}
	return l.pos, nil
}

func (r *Request) requestLine(line []byte) error {
	if len(line) == 0 {
		return errLeadingLine
	}
	first := bytes.IndexByte(line, ' ')
	last := bytes.LastIndexByte(line, ' ')
	if first <= 0 || last == first {
		return errRequestLine
	}
	r.Method, r.Target = line[:first], line[first+1:last]
	if !all(r.Method, isToken) {
		return errMethod
	}
	version := line[last+1:]
	switch {
	case string(version) == "HTTP/1.1":
		r.Minor = 1
	case string(version) == "HTTP/1.0":
		r.Minor = 0
	case string(r.Method) == "PRI":
		return errPreface
	case len(version) == 8 && string(version[:5]) == "HTTP/" && version[6] == '.' &&
		'0' <= version[5] && version[5] <= '9' && '0' <= version[7] && version[7] <= '9':
		return errVersion
	default:
		return errVersionSyntax
	}
	return r.parseTarget()
}

// parseTarget accepts origin form, absolute form and OPTIONS *.
func (r *Request) parseTarget() error {
	t := r.Target
	if len(t) == 0 {
		return errRequestLine
	}
	if string(r.Method) == "CONNECT" {
		return errConnect
	}
	if string(t) == "*" {
		if string(r.Method) != "OPTIONS" {
			return errAsterisk
		}
		r.Path = t
		return nil
	}
	if t[0] != '/' {
		var scheme int
		switch {
		case len(t) >= 7 && equalFold(t[:7], "http://"):
			scheme = 7
		case len(t) >= 8 && equalFold(t[:8], "https://"):
			scheme = 8
		default:
			return errTargetForm
		}
		r.Absolute = true
		end := bytes.IndexAny(t[scheme:], "/?#")
		if end < 0 {
			end = len(t) - scheme
		}
		r.Host = t[scheme : scheme+end]
		if bytes.IndexByte(r.Host, '@') >= 0 {
			return errUserinfo
		}
		if !validHost(r.Host) {
			return errHost
		}
		t = t[scheme+end:]
	}
	return r.splitPath(t)
}

func (r *Request) splitPath(t []byte) error {
	path, query := t, []byte(nil)
	for i := range t {
		c := t[i]
		switch {
		case chars[c]&isTarget == 0:
			return errTarget
		case c == '#':
			return errFragment
		case c == '?' && !r.HasQuery:
			path, query = t[:i], t[i+1:]
			r.HasQuery = true
		case c == '%' && !r.HasQuery:
			if i+2 >= len(t) || chars[t[i+1]]&isHex == 0 || chars[t[i+2]]&isHex == 0 {
				return errEscape
			}
		}
	}
	if len(path) == 0 {
		path = slash
	}
	r.Path, r.RawQuery = path, query
	return nil
}

//nolint:gochecknoglobals // a constant
var slash = []byte("/")

// interpret derives host, framing and connection handling from the fields.
func (r *Request) interpret() error {
	var f framing
	var upgrade []byte
	hosts, expects, hasUpgrade := 0, 0, false
	for i := range r.Fields {
		v := r.Fields[i].Value
		switch r.Fields[i].ID {
		case Host:
			if hosts++; hosts > 1 {
				return errHosts
			}
			if !validHost(v) {
				return errHost
			}
			if r.Absolute && !equalFold(r.Host, v) {
				return errTargetHost
			}
			r.Host = v
		case ContentLength, TransferEncoding:
			if err := f.field(&r.Fields[i]); err != nil {
				return err
			}
		case Connection:
			r.options.parse(v)
		case Expect:
			if expects++; expects > 1 {
				return errExpects
			}
			if !equalFold(v, "100-continue") {
				return errExpect
			}
		case Upgrade:
			if hasUpgrade {
				return errUpgrade
			}
			upgrade, hasUpgrade = v, true
		case Trailer:
			if err := checkAnnounced(v); err != nil {
				return err
			}
		default:
		}
	}
	if hosts == 0 && (r.Minor > 0 || r.Absolute) {
		return errNoHost
	}
	if f.chunked && r.Minor == 0 {
		return errTE10
	}
	if f.chunked && f.hasLength {
		return errLengthAndTE
	}
	r.Chunked, r.Length = f.chunked, f.length
	r.KeepAlive = !r.options.close && (r.Minor > 0 || r.options.keepAlive)
	r.ExpectContinue = expects > 0 && r.Minor > 0 && (f.chunked || f.length > 0)
	if hasUpgrade {
		return r.interpretUpgrade(upgrade)
	}
	return nil
}

func (r *Request) interpretUpgrade(v []byte) error {
	if !equalFold(v, "websocket") {
		return errUpgrade
	}
	if !r.options.upgrade {
		return nil // RFC 9110 section 7.8: without the connection option it means nothing
	}
	if string(r.Method) != "GET" || r.Minor == 0 {
		return errUpgradeMethod
	}
	if r.Chunked || r.Length > 0 {
		return errUpgradeBody
	}
	r.WebSocket = true
	return nil
}

// EndToEnd removes, in place, every field that belongs to this connection or
// to its framing, those that Connection lists included, and Host, and returns
// the rest. Expect and Upgrade are removed too: they are in the head's own
// fields, and whoever forwards them writes them anew.
func (r *Request) EndToEnd() Fields {
	r.Fields = r.Fields.endToEnd(r.options.listed)
	return r.Fields
}

// ParsePath checks a target in origin form, as HTTP/2 has it in :path, and takes it apart. All are views of t.
func ParsePath(t []byte) (path, query []byte, hasQuery bool, err error) {
	if len(t) == 0 || t[0] != '/' {
		return nil, nil, false, errTargetForm
	}
	var r Request
	err = r.splitPath(t)
	return r.Path, r.RawQuery, r.HasQuery, err
}

// ValidHost reports whether b may be a Host field or an authority: a name or an address, and perhaps a port.
func ValidHost(b []byte) bool { return validHost(b) }

// IsToken reports whether b is a token (RFC 9110 section 5.6.2), as a method must be.
func IsToken(b []byte) bool { return all(b, isToken) }
