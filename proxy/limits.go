package proxy

import "github.com/meshd/meshd/catalog"

// Limits bound what applications and other proxies can make a proxy hold and
// do. 0 is the proxy's default, which is in the reference. They are for what
// is opened after they came; what is open keeps those it began with.
type Limits struct {
	// Connections is how many may be open per listener.
	Connections int `json:"connections,omitzero"`
	// HeadBytes bounds the head of a request or response, of either version of
	// HTTP, and its trailers.
	HeadBytes int `json:"head_bytes,omitzero"`
	// LineBytes bounds a line of an HTTP/1 head, and a field of HTTP/2's.
	LineBytes int `json:"line_bytes,omitzero"`
	// Fields bounds the number of fields of a head.
	Fields int `json:"fields,omitzero"`
	// AllowUnderscore admits names of fields with an underscore, which some
	// applications can't tell from those with a hyphen.
	AllowUnderscore bool `json:"allow_underscore,omitzero"`
	// HTTP2 is what else bounds HTTP/2.
	HTTP2 HTTP2Limits `json:"http2,omitzero"`
}

// HTTP2Limits bound what a peer may do on a connection of HTTP/2. Connections
// between proxies carry the streams of many clients, each of which was held to
// the limits already: there Streams, Window and Resets count only where they
// are higher than the proxy's default for such connections.
type HTTP2Limits struct {
	// Streams is how many exchanges may be under way.
	Streams int `json:"streams,omitzero"`
	// StreamWindow is how many bytes of a stream are held.
	StreamWindow int `json:"stream_window,omitzero"`
	// Window is how many bytes of all streams are held.
	Window int `json:"window,omitzero"`
	// Resets is how many streams may be reset within 30 s.
	Resets int `json:"resets,omitzero"`
	// Control is how many frames may bring nothing within 30 s.
	Control int `json:"control,omitzero"`
	// Continuations is how many CONTINUATION frames a head may have.
	Continuations int `json:"continuations,omitzero"`
	// Answers is how many bytes of answers may wait for the peer.
	Answers int `json:"answers,omitzero"`
}

// Validate reports every problem of the limits as catalog.FieldErrors, with
// paths such as http2.streams.
func (l Limits) Validate() error {
	var p catalog.Problems
	h := l.HTTP2
	for _, one := range []struct {
		field            string
		value, low, high int
	}{
		{"connections", l.Connections, 1, 1_000_000},
		{"head_bytes", l.HeadBytes, 1 << 10, 256 << 10},
		{"line_bytes", l.LineBytes, 256, 256 << 10},
		{"fields", l.Fields, 10, 1000},
		{"http2.streams", h.Streams, 1, 10_000},
		// A peer may send 65,535 bytes before it knows of a window (RFC 9113,
		// section 6.9.2); 256 streams of an upstream must stay below 2^31 (6.9.1).
		{"http2.stream_window", h.StreamWindow, 64 << 10, 4 << 20},
		{"http2.window", h.Window, 64 << 10, 1 << 30},
		{"http2.resets", h.Resets, 1, 1_000_000},
		{"http2.control", h.Control, 100, 1_000_000},
		{"http2.continuations", h.Continuations, 1, 1000},
		{"http2.answers", h.Answers, 1 << 10, 1 << 20},
	} {
		if one.value != 0 && (one.value < one.low || one.value > one.high) {
			p.Add(one.field, "%d: write %d to %d, or leave it out for the default", one.value, one.low, one.high)
		}
	}
	if l.HeadBytes != 0 && l.LineBytes > l.HeadBytes {
		p.Add("line_bytes", "%d is more than head_bytes, %d: a line is part of a head", l.LineBytes, l.HeadBytes)
	}
	if h.Window != 0 && h.StreamWindow > h.Window {
		p.Add("http2.stream_window", "%d is more than http2.window, %d: a stream can't have more than all of them", h.StreamWindow, h.Window)
	}
	return p.Err()
}
