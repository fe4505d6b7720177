package http1

// framing collects Content-Length and Transfer-Encoding.
type framing struct {
	length    int64
	hasLength bool
	chunked   bool
}

func (f *framing) field(field *Field) error {
	if field.ID == ContentLength {
		if f.hasLength {
			return errLengths
		}
		f.hasLength = true
		n, ok := ParseLength(field.Value)
		if !ok {
			return errLength
		}
		f.length = n
		return nil
	}
	if f.chunked {
		return errTEs
	}
	if !equalFold(field.Value, "chunked") {
		return errTE
	}
	f.chunked = true
	return nil
}

// ParseLength accepts 1*DIGIT without leading zeros, up to 18 digits.
func ParseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 || b[0] == '0' && len(b) > 1 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// options is what Connection fields say.
type options struct {
	close, keepAlive, upgrade bool
	// listed says that there are other names, to be looked for per field.
	listed bool
}

func (o *options) parse(v []byte) {
	for len(v) > 0 {
		var item []byte
		item, v = nextItem(v)
		switch {
		case len(item) == 0:
		case equalFold(item, "close"):
			o.close = true
		case equalFold(item, "keep-alive"):
			o.keepAlive = true
		case equalFold(item, "upgrade"):
			o.upgrade = true
		default:
			o.listed = true
		}
	}
}

// HopByHop reports a name that never passes a proxy (RFC 9110 section 7.6.1),
// or that is written anew from the head's own fields.
func HopByHop(id Known) bool {
	switch id {
	case Host, Connection, ContentLength, TransferEncoding, Expect, Upgrade, TE,
		KeepAlive, ProxyConnection, ProxyAuthenticate, ProxyAuthorization, HTTP2Settings:
		return true
	default:
		return false
	}
}

// endToEnd filters in place.
func (f Fields) endToEnd(listed bool) Fields {
	kept := f[:0]
	if listed {
		// First only what Connection lists, so that its lines can still be
		// read: they are among those kept or those to come.
		for i := range f {
			if f[i].ID == Connection || !isListed(f[i].Name, kept) && !isListed(f[i].Name, f[i+1:]) {
				kept = append(kept, f[i])
			}
		}
		f, kept = kept, kept[:0]
	}
	for i := range f {
		if HopByHop(f[i].ID) {
			continue
		}
		if len(kept) != i {
			kept = append(kept, f[i])
		} else {
			kept = f[:i+1]
		}
	}
	return kept
}

func isListed(name []byte, among Fields) bool {
	for i := range among {
		if among[i].ID != Connection {
			continue
		}
		for v := among[i].Value; len(v) > 0; {
			var item []byte
			item, v = nextItem(v)
			if equalFold(item, name) {
				return true
			}
		}
	}
	return false
}

// ForbiddenTrailer reports a name that must not arrive after the body, because
// it frames, routes, authorizes or describes it (RFC 9110 section 6.5.1).
func ForbiddenTrailer(id Known) bool {
	switch id {
	case Authorization, ContentType, ForwardedClientCert, MeshHeader, Trailer:
		return true
	default:
		return HopByHop(id)
	}
}

// checkAnnounced refuses a Trailer field that announces framing.
func checkAnnounced(v []byte) error {
	for len(v) > 0 {
		var item []byte
		item, v = nextItem(v)
		switch lookup(item) {
		case ContentLength, TransferEncoding, Trailer:
			return errTrailerName
		default:
		}
	}
	return nil
}
