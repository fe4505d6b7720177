package http1

// Response is the head of a response, as it was received. The zero value is
// ready; one value parses any number of heads and keeps its field list's
// memory. All slices are views into the buffer given to Parse.
type Response struct {
	Status int
	Reason []byte
	Minor  uint8
	// Chunked, UntilClose and Length say how the body is framed, in that
	// order; Length is -1 if no Content-Length was there. See BodyFor.
	Chunked bool
	Length  int64
	// KeepAlive says that the server lets the connection be used again.
	KeepAlive bool
	// WebSocket says that a 101 switches to websocket.
	WebSocket bool
	// Fields has every field line as received; see [Response.EndToEnd].
	Fields Fields

	scanned int
	options options
}

// Reset forgets the head, not the memory.
func (r *Response) Reset() { *r = Response{Fields: r.Fields[:0], Length: -1} }

// Parse parses the head at the beginning of buf, as [Request.Parse] does.
// Underscores in names are always allowed: what an application says is its own
// affair, as long as its framing is beyond doubt.
func (r *Response) Parse(buf []byte, lim *Limits) (int, error) {
	l := lines{buf: buf, pos: r.scanned, lim: lim, underscore: true}
	if r.scanned > 0 {
		if err := l.skim(); err != nil {
			r.scanned = l.pos
			return 0, badGateway(err)
		}
		l.pos = 0
	}
	r.Reset()
	line, err := l.next(errLineLong)
	if err != nil {
		return 0, badGateway(err)
	}
	if err := r.statusLine(line); err != nil {
		return 0, err
	}
	for {
		line, err := l.next(errLineLong)
		if err != nil {
			r.scanned = l.pos
			return 0, badGateway(err)
		}
		if len(line) == 0 {
			break
		}
		if r.Fields, err = l.field(line, r.Fields); err != nil {
			return 0, badGateway(err)
		}
	}
	if err := r.interpret(); err != nil {
		return 0, badGateway(err)
	}
	return l.pos, nil
}

// badGateway gives a refusal the status that fits a response.
func badGateway(err error) error {
	if e, ok := err.(*Error); ok { //nolint:errorlint // refusals of this package are never wrapped
		return &Error{Status: 502, Reason: e.Reason, Limit: e.Limit}
	}
	return err
}

func (r *Response) statusLine(line []byte) error {
	if len(line) < 12 || string(line[:5]) != "HTTP/" {
		return errStatusLine
	}
	switch string(line[5:9]) {
	case "1.1 ":
		r.Minor = 1
	case "1.0 ":
		r.Minor = 0
	default:
		return errStatusVersion
	}
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return errStatusLine
		}
		r.Status = r.Status*10 + int(c-'0')
	}
	if r.Status < 100 {
		return errStatusLine
	}
	if len(line) > 12 {
		if line[12] != ' ' || !validValue(line[13:]) {
			return errStatusLine
		}
		r.Reason = line[13:]
	}
	return nil
}

func (r *Response) interpret() error {
	var f framing
	websocket := false
	for i := range r.Fields {
		v := r.Fields[i].Value
		switch r.Fields[i].ID {
		case ContentLength, TransferEncoding:
			if err := f.field(&r.Fields[i]); err != nil {
				return err
			}
		case Connection:
			r.options.parse(v)
		case Upgrade:
			websocket = equalFold(v, "websocket")
		default:
		}
	}
	if f.chunked && r.Minor == 0 {
		return errTE10
	}
	if f.chunked && f.hasLength {
		return errLengthAndTE
	}
	r.Chunked = f.chunked
	r.Length = -1
	if f.hasLength {
		r.Length = f.length
	}
	r.KeepAlive = !r.options.close && (r.Minor > 0 || r.options.keepAlive)
	r.WebSocket = r.Status == 101 && websocket && r.options.upgrade
	return nil
}

// BodyFor says how the body in answer to a request is framed (RFC 9112 section
// 6.3). NoBody for HEAD, 1xx, 204 and 304, whatever the fields say.
func (r *Response) BodyFor(method []byte) Framing {
	switch {
	case NoBodyStatus(r.Status) || string(method) == "HEAD":
		return NoBody
	case r.Chunked:
		return Chunked
	case r.Length >= 0:
		return Sized
	default:
		return UntilClose
	}
}

// NoBodyStatus reports a status whose responses never have a body: 1xx, 204
// and 304.
func NoBodyStatus(status int) bool { return status < 200 || status == 204 || status == 304 }

// EndToEnd removes, in place, every field that belongs to this connection or
// to its framing, those that Connection lists included, and returns the rest.
func (r *Response) EndToEnd() Fields {
	r.Fields = r.Fields.endToEnd(r.options.listed)
	return r.Fields
}

// Framing is how a body's end is found.
type Framing uint8

// The framings. The zero value has no body.
const (
	NoBody Framing = iota
	Sized
	Chunked
	UntilClose
)
