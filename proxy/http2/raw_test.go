package http2_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// raw is a client that sends frames as it is told.
type raw struct {
	*xhttp2.Framer
	tb  testing.TB
	nc  net.Conn
	out bytes.Buffer
	enc *xhpack.Encoder
}

// dialRaw connects, and sends the preface and SETTINGS.
func dialRaw(tb testing.TB, addr string, settings ...xhttp2.Setting) *raw {
	tb.Helper()
	r := dialSilent(tb, addr)
	r.bytes(xhttp2.ClientPreface)
	r.check(r.WriteSettings(settings...))
	return r
}

// dialSilent connects.
func dialSilent(tb testing.TB, addr string) *raw {
	tb.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	r := &raw{Framer: xhttp2.NewFramer(nc, nc), tb: tb, nc: nc}
	r.ReadMetaHeaders = xhpack.NewDecoder(4096, nil)
	r.AllowIllegalWrites = true
	r.enc = xhpack.NewEncoder(&r.out)
	return r
}

// check fails the test unless the server just closed the connection, which the
// test will see.
func (r *raw) check(err error) {
	r.tb.Helper()
	if err != nil && !errors.As(err, new(*net.OpError)) {
		r.tb.Error(err)
	}
}

func (r *raw) bytes(s string) {
	r.tb.Helper()
	_, err := io.WriteString(r.nc, s)
	r.check(err)
}

// block encodes "name: value" lines.
func (r *raw) block(lines ...string) []byte {
	r.out.Reset()
	for _, line := range lines {
		colon := strings.Index(line[1:], ":") + 1
		if err := r.enc.WriteField(xhpack.HeaderField{Name: line[:colon], Value: strings.TrimPrefix(line[colon+1:], " ")}); err != nil {
			r.tb.Error(err)
		}
	}
	return bytes.Clone(r.out.Bytes())
}

// head sends HEADERS with exactly these lines.
func (r *raw) head(id uint32, end bool, lines ...string) {
	r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(lines...), EndHeaders: true, EndStream: end}))
}

// request sends the head of a request that is in order, with more lines.
func (r *raw) request(id uint32, end bool, method, path string, lines ...string) {
	r.head(id, end, append([]string{":method: " + method, ":scheme: http", ":authority: app.example", ":path: " + path}, lines...)...)
}

func (r *raw) data(id uint32, end bool, data string) { r.check(r.WriteData(id, end, []byte(data))) }

// next returns the next frame that is neither SETTINGS nor WINDOW_UPDATE, nor
// PING unless asked for. nil is the end of the connection.
func (r *raw) next() xhttp2.Frame {
	for {
		f, err := r.ReadFrame()
		if err != nil {
			if errors.As(err, new(net.Error)) && errors.Is(err, errTimeout(err)) {
				r.tb.Error("nothing came any more")
			}
			return nil
		}
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				_ = r.WriteSettingsAck()
			}
		case *xhttp2.WindowUpdateFrame:
		default:
			return f
		}
	}
}

func errTimeout(err error) error {
	var e net.Error
	if errors.As(err, &e) && e.Timeout() {
		return err
	}
	return io.ErrClosedPipe
}

// outcome is what the server made of a stream.
type outcome struct {
	status  string
	interim string
	body    string
	trailer string
	ended   bool
	reset   xhttp2.ErrCode
	isReset bool
	goAway  xhttp2.ErrCode
	debug   string
	isGone  bool // the connection ended, perhaps with goAway
}

// outcome reads what comes on a stream, to its end.
func (r *raw) outcome(id uint32) (o outcome) {
	for {
		f := r.next()
		if f == nil {
			o.isGone = true
			return o
		}
		switch f := f.(type) {
		case *xhttp2.GoAwayFrame:
			o.goAway, o.debug = f.ErrCode, string(f.DebugData())
			continue
		case *xhttp2.RSTStreamFrame:
			if f.StreamID == id {
				o.reset, o.isReset = f.ErrCode, true
				return o
			}
		case *xhttp2.MetaHeadersFrame:
			if f.StreamID != id {
				continue
			}
			switch status := f.PseudoValue("status"); {
			case strings.HasPrefix(status, "1"):
				o.interim += status + " "
			case status == "":
				for _, h := range f.RegularFields() {
					o.trailer += h.Name + "=" + h.Value + " "
				}
			default:
				o.status = status
			}
		case *xhttp2.DataFrame:
			if f.StreamID != id {
				continue
			}
			o.body += string(f.Data())
		}
		if f.Header().StreamID == id && f.Header().Flags.Has(xhttp2.FlagDataEndStream) &&
			(f.Header().Type == xhttp2.FrameData || f.Header().Type == xhttp2.FrameHeaders) {
			o.ended = true
			return o
		}
	}
}

// rule is one rule of RFC 9113 that a client breaks, or does not.
type rule struct {
	send   func(r *raw)
	status string         // of the response
	body   string         // that the response contains
	reset  xhttp2.ErrCode // of stream 1
	goAway xhttp2.ErrCode
}

// echoHead answers with what the handler saw of the request.
func echoHead(ex *l7.Exchange) l7.Response {
	h := &ex.Request
	if string(h.Path) == "/hang" {
		return &hanging{}
	}
	var b bytes.Buffer
	b.WriteString(string(h.Method) + " " + string(h.Authority) + " " + string(h.Path))
	if h.HasQuery {
		b.WriteString("?" + string(h.RawQuery))
	}
	for i := range h.Fields {
		b.WriteString("|" + string(h.Fields[i].Name) + "=" + string(h.Fields[i].Value))
	}
	if ex.Body == nil {
		return text(b.String())
	}
	return &answer{head: l7.ResponseHead{Status: 200, Length: -1}, body: ex.Body}
}

func TestRules(t *testing.T) {
	t.Parallel()
	const protocol, closed = xhttp2.ErrCodeProtocol, xhttp2.ErrCodeStreamClosed
	one := func(lines ...string) func(*raw) {
		return func(r *raw) { r.request(1, true, "GET", "/", lines...) }
	}
	whole := func(lines ...string) func(*raw) { return func(r *raw) { r.head(1, true, lines...) } }
	body := func(first string, parts ...string) func(*raw) {
		return func(r *raw) {
			r.request(1, false, "POST", "/", first)
			for i, p := range parts {
				r.data(1, i == len(parts)-1, p)
			}
		}
	}
	long := strings.Repeat("x", 9<<10)
	rules := map[string]rule{
		"a request":             {send: one("a: b"), status: "200", body: "GET app.example /|a=b|x-forwarded-client-cert=By=a;URI=b"},
		"normalized":            {send: whole(":method: GET", ":scheme: http", ":authority: APP.example.:80", ":path: /a/./b/..//c?q"), status: "200", body: "GET app.example:80 /a/c?q"},
		"host instead":          {send: whole(":method: GET", ":scheme: http", ":path: /", "host: h.example"), status: "200", body: "GET h.example /|x-"},
		"host and authority":    {send: one("host: App.Example"), status: "200", body: "GET app.example /|x-"},
		"another host":          {send: one("host: other.example"), status: "400", body: "host field is not the authority"},
		"two hosts":             {send: one("host: app.example", "host: app.example"), status: "400", body: "more than one host"},
		"user info":             {send: whole(":method: GET", ":scheme: http", ":authority: a@b", ":path: /"), status: "400", body: "authority is not valid"},
		"no host":               {send: whole(":method: GET", ":scheme: http", ":path: /"), status: "400", body: "names no host"},
		"cookies":               {send: one("cookie: a=1", "x: y", "cookie: b=2", "cookie: c=3"), status: "200", body: "|cookie=a=1; b=2; c=3|x=y|"},
		"te":                    {send: one("te: trailers"), status: "200", body: "|te=trailers|"},
		"options":               {send: whole(":method: OPTIONS", ":scheme: http", ":authority: a", ":path: *"), status: "200", body: "OPTIONS a *"},
		"what only we may say":  {send: one("x-forwarded-client-cert: By=me", "mesh-error: x"), status: "200", body: "GET app.example /|x-forwarded-client-cert=By=a;URI=b"},
		"hop-by-hop":            {send: one("proxy-authorization: x", "te: trailers", "b: c"), status: "200", body: "GET app.example /|te=trailers|b=c|x-"},
		"expect":                {send: one("expect: 200-ok"), status: "417"},
		"underscore":            {send: one("a_b: c"), status: "400", body: "underscore"},
		"underscore in gRPC":    {send: one("a_b: c", "content-type: application/grpc"), status: "200", body: "a_b=c"},
		"a dot path":            {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /%2e%2e/x"), status: "200"},
		"an ambiguous path":     {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /a%2fb"), status: "400", body: "ambiguous"},
		"path with a fragment":  {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /a#b"), status: "400", body: "path is not valid"},
		"path with white space": {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /a b"), status: "400", body: "path is not valid"},
		"path of a URL":         {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: http://b/"), status: "400", body: "path is not valid"},
		"a star path":           {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: *"), status: "400", body: "path is not valid"},
		"method":                {send: whole(":method: G T", ":scheme: http", ":authority: a", ":path: /"), status: "400", body: "method"},
		"CONNECT":               {send: whole(":method: CONNECT", ":authority: a:1"), status: "405"},
		"CONNECT with a path":   {send: whole(":method: CONNECT", ":authority: a:1", ":path: /", ":scheme: http"), reset: protocol},
		"another protocol":      {send: whole(":method: CONNECT", ":protocol: connect-udp", ":authority: a:1", ":path: /", ":scheme: http"), status: "501"},
		":protocol with GET":    {send: one(":protocol: websocket"), reset: protocol},
		"a long field":          {send: one("a: " + long), status: "431", body: "a field is longer"},
		"long fields": {send: func(r *raw) {
			b := r.block(":method: GET", ":scheme: http", ":authority: a", ":path: /", "a: "+long[:8000], "b: "+long[:8000], "c: "+long[:8000], "d: "+long[:8000], "e: "+long[:8000])
			r.check(r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:16000], EndStream: true}))
			r.check(r.WriteContinuation(1, false, b[16000:30000]))
			r.check(r.WriteContinuation(1, true, b[30000:]))
		}, status: "431", body: "head is larger"},
		"no path":              {send: whole(":method: GET", ":scheme: http", ":authority: a"), reset: protocol},
		"empty path":           {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: "), reset: protocol},
		"no method":            {send: whole(":scheme: http", ":authority: a", ":path: /"), reset: protocol},
		"no scheme":            {send: whole(":method: GET", ":authority: a", ":path: /"), reset: protocol},
		"a status":             {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /", ":status: 200"), reset: protocol},
		"an unknown pseudo":    {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /", ":x: y"), reset: protocol},
		"a pseudo behind":      {send: whole(":method: GET", ":scheme: http", ":authority: a", "x: y", ":path: /"), reset: protocol},
		"upper case":           {send: one("A: b"), reset: protocol},
		"a name of two":        {send: one("a b: c"), reset: protocol},
		"CR and LF":            {send: one("a: b\r\nc: d"), reset: protocol},
		"NUL":                  {send: one("a: b\x00c"), reset: protocol},
		"LF in the path":       {send: whole(":method: GET", ":scheme: http", ":authority: a", ":path: /\n"), reset: protocol},
		"white space in front": {send: one("a:  b"), reset: protocol},
		"connection":           {send: one("connection: close"), reset: protocol},
		"upgrade":              {send: one("upgrade: h2c"), reset: protocol},
		"transfer-encoding":    {send: one("transfer-encoding: chunked"), reset: protocol},
		"te of more":           {send: one("te: trailers, gzip"), reset: protocol},
		"lengths":              {send: body("content-length: 1, 1", "a"), reset: protocol},
		"a length and its sum": {send: body("content-length: 3", "a", "bc"), status: "200", body: "abc"},
		"more than declared":   {send: body("content-length: 3", "a", "bcd"), reset: protocol},
		"less than declared":   {send: body("content-length: 3", "a", "b"), reset: protocol},
		"a length of nothing":  {send: one("content-length: 3"), reset: protocol},
		"less, with trailers": {send: func(r *raw) {
			r.request(1, false, "POST", "/", "content-length: 3")
			r.data(1, false, "a")
			r.head(1, true, "a: b")
		}, reset: protocol},
		"trailers": {send: func(r *raw) {
			r.request(1, false, "POST", "/")
			r.data(1, false, "abc")
			r.head(1, true, "a: b", "content-length: 9", "authorization: c")
		}, status: "200", body: "abc"},
		"trailers without an end": {send: func(r *raw) {
			r.request(1, false, "POST", "/")
			r.head(1, false, "a: b")
		}, reset: protocol},
		"trailers with a pseudo": {send: func(r *raw) {
			r.request(1, false, "POST", "/")
			r.head(1, true, ":path: /")
		}, reset: protocol},
		"data behind the end": {send: func(r *raw) {
			r.request(1, false, "POST", "/hang")
			r.data(1, true, "a")
			r.data(1, true, "a")
		}, reset: closed},
		"padding": {send: func(r *raw) {
			r.request(1, false, "POST", "/")
			r.check(r.WriteDataPadded(1, false, []byte("ab"), make([]byte, 200)))
			r.check(r.WriteDataPadded(1, true, []byte("c"), nil))
		}, status: "200", body: "abc"},
		"an even stream":       {send: func(r *raw) { r.request(2, true, "GET", "/") }, goAway: protocol},
		"a second preface":     {send: func(r *raw) { r.bytes(xhttp2.ClientPreface) }, goAway: xhttp2.ErrCodeFrameSize},
		"a long frame":         {send: func(r *raw) { r.check(r.WriteRawFrame(xhttp2.FramePing, 0, 0, make([]byte, 16<<10+1))) }, goAway: xhttp2.ErrCodeFrameSize},
		"a broken block":       {send: func(r *raw) { r.check(r.WriteRawFrame(xhttp2.FrameHeaders, 5, 1, []byte{0x80})) }, goAway: xhttp2.ErrCodeCompression},
		"a push":               {send: func(r *raw) { r.check(r.WriteRawFrame(xhttp2.FramePushPromise, 4, 1, make([]byte, 8))) }, goAway: protocol},
		"data on stream 0":     {send: func(r *raw) { r.check(r.WriteRawFrame(xhttp2.FrameData, 0, 0, nil)) }, goAway: protocol},
		"window of 2^31":       {send: func(r *raw) { r.check(r.WriteWindowUpdate(0, 1<<31-1)) }, goAway: xhttp2.ErrCodeFlowControl},
		"a broken setting":     {send: func(r *raw) { r.check(r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxFrameSize, Val: 1})) }, goAway: protocol},
		"more than the window": {send: overrun, reset: xhttp2.ErrCodeFlowControl},
	}
	for name, c := range rules {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serve(t, handler(echoHead), nil)
			r := dialRaw(t, s.addr)
			c.send(r)
			got := r.outcome(1)
			switch {
			case c.status != "":
				if got.status != c.status || !got.ended || !strings.Contains(got.body, c.body) {
					t.Errorf("got %+v, want status %s and %q", got, c.status, c.body)
				}
				if rec := s.recs.next(t); rec.Reason == l7.None != (c.status == "200") {
					t.Errorf("record %+v", rec)
				}
			case c.reset != 0:
				if !got.isReset || got.reset != c.reset {
					t.Errorf("got %+v, want a reset with %v", got, c.reset)
				}
			case got.goAway != c.goAway || !got.isGone:
				t.Errorf("got %+v, want GOAWAY with %v", got, c.goAway)
			default:
				var e *http2.ConnError
				if err := s.end(t); !errors.As(err, &e) || uint32(e.Code) != uint32(c.goAway) || e.Err.Error() != got.debug {
					t.Errorf("Serve returned %v, the client heard %q", err, got.debug)
				}
			}
		})
	}
}

// overrun sends a byte more than the stream's window.
func overrun(r *raw) {
	r.request(1, false, "POST", "/hang")
	for range 4 {
		r.data(1, false, strings.Repeat("x", 16<<10))
	}
	r.data(1, false, "x")
}
