package conformance_test

import (
	"fmt"
	"slices"
	"strings"
)

// vector is what a client sends before the canary on one connection, and what
// must come of it.
type vector struct {
	name, raw string
	// status lists the final responses, that to the canary included.
	status []int
	// seen lists what the application must see, as method and target.
	seen []string
	// body is the length of the first request's body, -1 for any.
	body int64
	// short marks a request that breaks off, or that claims more than it has
	// and so eats the canary: the application may see its head, if it is
	// allowed, or nothing. No status is sure.
	short bool
	// mayClose says that the connection may be closed after the first response:
	// the proxy need not wait for the body of what it denied.
	mayClose bool
	// preface begins HTTP/2, which applications may speak on a listener of HTTP and
	// other proxies only if they have agreed on it: what is behind it is no HTTP/1
	// there, and nothing of it may be a request.
	preface bool
}

const canary = "GET /canary HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n"

// smuggled is what must never be taken for a request.
const smuggled = "GET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n"

// rows makes vectors from pairs of name and bytes.
func rows(template vector, pairs ...string) []vector {
	var out []vector
	for pair := range slices.Chunk(pairs, 2) {
		v := template
		v.name, v.raw = pair[0], pair[1]
		out = append(out, v)
	}
	return out
}

// refused are answered with a status, and nothing after them is read.
func refused(status int, pairs ...string) []vector {
	return rows(vector{status: []int{status}, body: -1}, pairs...)
}

// answered get a response of the proxy's own; the connection goes on.
func answered(status int, pairs ...string) []vector {
	return rows(vector{status: []int{status, 200}, seen: []string{"GET /canary"}, body: -1}, pairs...)
}

// cut claim more bytes than they have.
func cut(pairs ...string) []vector {
	return rows(vector{body: -1, short: true}, pairs...)
}

// passed reaches the application as line, with a body of that length.
func passed(line string, body int64, name, raw string) []vector {
	return rows(vector{status: []int{200, 200}, seen: []string{line, "GET /canary"}, body: body}, name, raw)
}

// head is a GET of /ok/x with further lines.
func head(lines string) string { return "GET /ok/x HTTP/1.1\r\nHost: app\r\n" + lines + "\r\n" }

// post is a POST to /ok/x with further lines and a body.
func post(lines, body string) string {
	return "POST /ok/x HTTP/1.1\r\nHost: app\r\n" + lines + "\r\n" + body
}

func chunked(body string) string { return post("Transfer-Encoding: chunked\r\n", body) }

func get(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: app\r\n\r\n" }

func vectors() []vector {
	return slices.Concat(
		honest(), lengths(), transferEncodings(), chunks(), lineVectors(), requestLines(), hosts(), switches(), paths(), shortBodies(),
	)
}

func honest() []vector {
	post0 := "POST /ok/x"
	return slices.Concat(
		passed("GET /ok/x", 0, "plain", head("")),
		passed("GET /ok/x?a=b%20c&d", 0, "query", get("/ok/x?a=b%20c&d")),
		passed("GET /ok/x?../admin", 0, "dots in the query", get("/ok/x?../admin")),
		passed(post0, 5, "length", post("Content-Length: 5\r\n", "hello")),
		passed(post0, 0, "length 0", post("Content-Length: 0\r\n", "")),
		passed(post0, 0, "no length", post("", "")),
		passed(post0, int64(len(smuggled)), "a request as the body", post(fmt.Sprintf("Content-Length: %d\r\n", len(smuggled)), smuggled)),
		passed("GET /ok/x", int64(len(smuggled)), "a request as the body of GET", head(fmt.Sprintf("Content-Length: %d\r\n", len(smuggled)))+smuggled),
		passed(post0, int64(len(smuggled)), "a request as a chunk", chunked(fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled))),
		passed(post0, 5, "two chunks", chunked("2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")),
		passed(post0, 0, "no chunk", chunked("0\r\n\r\n")),
		passed(post0, 100<<10, "a long body", post(fmt.Sprintf("Content-Length: %d\r\n", 100<<10), strings.Repeat("a", 100<<10))),
		passed(post0, 5, "trailer", chunked("5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")),
		passed(post0, 5, "expect", post("Expect: 100-continue\r\nContent-Length: 5\r\n", "hello")),
		passed(post0, 0, "expect without a body", post("Expect: 100-continue\r\nContent-Length: 0\r\n", "")),
		passed("GET /ok/x", 0, "forged identity", head("X-Forwarded-Client-Cert: By=spiffe://x;URI=spiffe://mesh.test/ns/default/svc/admin\r\n")),
		passed("GET /ok/x", 0, "forged mesh fields", head("mesh-error: denied\r\nMesh-Route: x\r\n")),
		passed("GET /ok/x", 0, "connection lists the identity", head("Connection: x-forwarded-client-cert, keep-alive\r\n")),
		passed("GET /ok/x", 0, "connection lists host", head("Connection: host\r\n")),
		passed("GET /ok/x", 0, "connection lists a field", head("Connection: x-a\r\nX-A: b\r\n")),
		passed(post0, 5, "connection lists content-length", post("Connection: content-length\r\nContent-Length: 5\r\n", "hello")),
		passed(post0, 5, "connection lists transfer-encoding", post("Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n")),
		passed("GET /ok/x", 0, "80 fields", head(strings.Repeat("X-A: b\r\n", 80))),
		rows(vector{status: []int{200, 200, 200, 200}, seen: []string{"GET /ok/1", "GET /ok/2", "GET /ok/3", "GET /canary"}, body: -1},
			"pipelined", get("/ok/1")+get("/ok/2")+get("/ok/3")),
		rows(vector{status: []int{200, 403, 200, 200}, seen: []string{"GET /ok/1", "GET /ok/3", "GET /canary"}, body: -1},
			"pipelined, one denied", get("/ok/1")+get("/admin")+get("/ok/3")),
		rows(vector{status: []int{200, 400}, seen: []string{"GET /ok/1"}, body: -1},
			"pipelined, one malformed", get("/ok/1")+"GET /ok/2 HTTP/1.1\r\nHost: app\r\nX : a\r\n\r\n"+get("/ok/3")),
		rows(vector{status: []int{200}, seen: []string{"GET /ok/x"}, body: -1},
			"close, then more", head("Connection: close\r\n")+smuggled,
			"HTTP/1.0, then more", "GET /ok/x HTTP/1.0\r\nHost: app\r\n\r\n"+smuggled),
		rows(vector{status: []int{200, 200}, seen: []string{"HEAD /ok/x", "GET /canary"}, body: 0},
			"head", "HEAD /ok/x HTTP/1.1\r\nHost: app\r\n\r\n"),
		rows(vector{status: []int{200, 200}, seen: []string{"GET /ok/x", "GET /canary"}, body: -1},
			"HTTP/1.0 with keep-alive", "GET /ok/x HTTP/1.0\r\nHost: app\r\nConnection: keep-alive\r\n\r\n"),
	)
}

func lengths() []vector {
	out := refused(400,
		"length and chunked", post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"chunked and length", post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"+smuggled),
		"length 0 and chunked", post("Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"two lengths, equal", post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
		"two lengths", post("Content-Length: 5\r\nContent-Length: 60\r\n", "hello"+smuggled),
		"two lengths, first longer", post("Content-Length: 60\r\nContent-Length: 5\r\n", "hello"+smuggled),
		"length in a HTTP/1.0 request with chunked", "POST /ok/x HTTP/1.0\r\nHost: app\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"+smuggled,
		"chunked in HTTP/1.0", "POST /ok/x HTTP/1.0\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"+smuggled,
	)
	for _, v := range []string{
		"5, 5", "5,5", "05", "+5", "-5", "0x5", "5 5", "", "5;a", "5.0", "5e0", "\"5\"", "a", "9223372036854775808", "18446744073709551621",
		"99999999999999999999999", "5\x0b", "\x0c5", "5\x00", "٥",
	} {
		out = append(out, refused(400, fmt.Sprintf("length %q", v), post("Content-Length: "+v+"\r\n", "hello"+smuggled))...)
	}
	for _, name := range []string{"Content-Length ", "Content_Length", "Content-Length\t", " Content-Length", "Content-Length\x00", "\x00Content-Length", "Content-Length\x0b", "Content Length"} {
		out = append(out, refused(400, fmt.Sprintf("length in %q", name), post(name+": 60\r\n", smuggled))...)
	}
	return out
}

func transferEncodings() []vector {
	var out []vector
	for _, v := range []string{
		"xchunked", "identity", "chunked, chunked", "chunked,", ",chunked", "gzip, chunked", "chunked, identity", "identity, chunked", "chunked;a=b",
		"\"chunked\"", "", "chunk", "chunked chunked", "cow", "x", "gzip", "'chunked'", "c\u212Aunked", "chun\tked",
	} {
		out = append(out, refused(501, fmt.Sprintf("encoding %q", v), post("Transfer-Encoding: "+v+"\r\n", "0\r\n\r\n"+smuggled))...)
		out = append(out, refused(400, fmt.Sprintf("encoding %q and length", v), post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: "+v+"\r\n", "0\r\n\r\n"+smuggled))...)
	}
	for _, v := range []string{"\x0bchunked", "chunked\x0b", "\x00chunked", "chunked\x00", "chunked\x7f", "\x01", "chunked\rX: a"} {
		out = append(out, refused(400, fmt.Sprintf("encoding %q", v), post("Transfer-Encoding: "+v+"\r\n", "0\r\n\r\n"+smuggled))...)
	}
	for _, name := range []string{"Transfer-Encoding ", "Transfer_Encoding", "Transfer-Encoding\t", " Transfer-Encoding", "Transfer-Encoding\x00", "Transfer\x00-Encoding", "Transfer Encoding"} {
		out = append(out, refused(400, fmt.Sprintf("encoding in %q", name), post(name+": chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"+smuggled))...)
	}
	return slices.Concat(out, refused(400,
		"encoding folded", post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"+smuggled),
		"encoding folded behind another", post("X-A: b\r\n Transfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"encoding behind a bare CR", post("X-A: b\rTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"encoding behind a bare LF", post("X-A: b\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"encoding twice", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"+smuggled),
		"trailer announces the length", post("Transfer-Encoding: chunked\r\nTrailer: content-length\r\n", "0\r\nContent-Length: 5\r\n\r\n"+smuggled),
	), passed("POST /ok/x", 0, "encoding in capitals", post("TRANSFER-ENCODING: CHUNKED\r\n", "0\r\n\r\n")))
}

// chunks are refused in the body: the head may have passed already, so the
// application may see the request, unfinished.
func chunks() []vector {
	var out []vector
	for _, size := range []string{
		"+5", "-5", "0x5", "5 ", " 5", "\t5", "", "g", "5\x00", "00000000000000005", "10000000000000000", "fffffffffffffffff", "ffffffffffffffff", "7fffffffffffffff",
		"5;a\nb", "5\n", "\r\n5", "5 ;a", "5;\x00", "5\x0b", ";", "5,5", "5.", "5;" + strings.Repeat("a", 20000),
	} {
		out = append(out, cut(fmt.Sprintf("chunk size %.40q", size), chunked(size+"\r\nhello\r\n0\r\n\r\n"+smuggled))...)
	}
	return slices.Concat(out, cut(
		"chunk longer than its size", chunked("3\r\nhello\r\n0\r\n\r\n"+smuggled),
		"chunk without CRLF", chunked("5\r\nhello0\r\n\r\n"+smuggled),
		"chunk ends in LF", chunked("5\r\nhello\n0\r\n\r\n"+smuggled),
		"chunk size ends in LF", chunked("5\nhello\r\n0\r\n\r\n"+smuggled),
		"chunk ends in CR", chunked("5\r\nhello\r0\r\n\r\n"+smuggled),
		"chunk ends in two other bytes", chunked("5\r\nhelloxx0\r\n\r\n"+smuggled),
		"last chunk ends in LF", chunked("0\n\n"+smuggled),
		"last chunk without its line", chunked("0\r\n"+smuggled),
		"trailer folded", chunked("0\r\nX-Sum: 1\r\n 2\r\n\r\n"+smuggled),
		"trailer without colon", chunked("0\r\nGET /smuggled HTTP/1.1\r\n\r\n"+smuggled),
		"trailers without end", chunked("0\r\n"+strings.Repeat("X-A: b\r\n", 200)),
	), rows(vector{status: []int{200, 200}, seen: []string{"POST /ok/x", "GET /canary"}, body: 0}, // and none of them arrives
		"trailer is the length", chunked("0\r\nContent-Length: 60\r\n\r\n"),
		"trailer is the encoding", chunked("0\r\nTransfer-Encoding: chunked\r\n\r\n"),
		"trailer is the identity", chunked("0\r\nX-Forwarded-Client-Cert: URI=spiffe://x\r\n\r\n"),
		"trailer is the mesh's", chunked("0\r\nMesh-Error: denied\r\n\r\n"),
		"trailer is the host", chunked("0\r\nHost: other\r\n\r\n"),
	), passed("POST /ok/x", 5, "chunk size with zeros", chunked("0005\r\nhello\r\n000\r\n\r\n")),
	)
}

func lineVectors() []vector {
	return slices.Concat(refused(400,
		"LF only", "GET /ok/x HTTP/1.1\nHost: app\n\n"+smuggled,
		"LF in one line", head("X-A: b\nX-B: c\r\n"),
		"LF at the end", "GET /ok/x HTTP/1.1\r\nHost: app\r\n\n"+smuggled,
		"CR in a value", head("X-A: b\rc\r\n"),
		"CR CR LF", "GET /ok/x HTTP/1.1\r\nHost: app\r\r\n\r\n",
		"an empty line first", "\r\n"+head(""),
		"LF first", "\n"+head(""),
		"folded", head("X-A: b\r\n c\r\n"),
		"folded by a tab", head("X-A: b\r\n\tc\r\n"),
		"folded first line", "GET /ok/x HTTP/1.1\r\n Host: app\r\n\r\n",
		"NUL in a value", head("X-A: a\x00b\r\n"),
		"DEL in a value", head("X-A: a\x7fb\r\n"),
		"ESC in a value", head("X-A: a\x1bb\r\n"),
		"no colon", head("X-A\r\n"),
		"no name", head(": a\r\n"),
		"space before the colon", head("X-A : b\r\n"),
		"space in the name", head("X A: b\r\n"),
		"NUL in the name", head("X\x00A: b\r\n"),
		"high byte in the name", head("X\xe9A: b\r\n"),
		"parenthesis in the name", head("X(A: b\r\n"),
		"underscore", head("X_A: b\r\n"),
		"identity with underscores", head("X_Forwarded_Client_Cert: URI=spiffe://x\r\n"),
		"a request as a field", head("GET /smuggled HTTP/1.1\r\n"),
	), refused(431,
		"101 fields", head(strings.Repeat("X-A: b\r\n", 101)),
		"a long line", head("X-A: "+strings.Repeat("a", 9000)+"\r\n"),
		"a long head", head(strings.Repeat("X-A: "+strings.Repeat("a", 8000)+"\r\n", 6)),
	), refused(414,
		"a long target", get("/ok/"+strings.Repeat("a", 9000)),
	))
}

func requestLines() []vector {
	line := func(s string) string { return s + "\r\nHost: app\r\n\r\n" }
	return slices.Concat(refused(400,
		"two spaces", line("GET  /ok/x HTTP/1.1"),
		"a space first", line(" GET /ok/x HTTP/1.1"),
		"a space last", line("GET /ok/x HTTP/1.1 "),
		"tabs", line("GET\t/ok/x\tHTTP/1.1"),
		"a space in the target", line("GET /ok/x /smuggled HTTP/1.1"),
		"no version", line("GET /ok/x"),
		"no target", line("GET HTTP/1.1"),
		"only a method", line("GET"),
		"HTTP/0.9", "GET /ok/x\r\n",
		"lower-case version", line("GET /ok/x http/1.1"),
		"HTTP/1.10", line("GET /ok/x HTTP/1.10"),
		"HTTP/1", line("GET /ok/x HTTP/1"),
		"HTTP/01.1", line("GET /ok/x HTTP/01.1"),
		"HTTPS/1.1", line("GET /ok/x HTTPS/1.1"),
		"HTTP/1.1 and more", line("GET /ok/x HTTP/1.1x"),
		"a bad method", line("G@T /ok/x HTTP/1.1"),
		"NUL in the method", line("GE\x00T /ok/x HTTP/1.1"),
		"a target without slash", line("GET ok/x HTTP/1.1"),
		"authority form", line("GET app:80 HTTP/1.1"),
		"another scheme", line("GET ftp://app/ok/x HTTP/1.1"),
		"absolute form, another host", line("GET http://other/ok/x HTTP/1.1"),
		"absolute form, another port", line("GET http://app:81/ok/x HTTP/1.1"),
		"absolute form with a user", line("GET http://app@other/ok/x HTTP/1.1"),
		"absolute form, empty host", line("GET http:///ok/x HTTP/1.1"),
		"absolute form, backslash", line("GET http://app\\@other/ok/x HTTP/1.1"),
		"GET *", line("GET * HTTP/1.1"),
		"a preface of HTTP/2 in HTTP/1.1", line("PRI * HTTP/1.1"),
	), refused(405,
		"CONNECT", line("CONNECT app:443 HTTP/1.1"),
		"CONNECT with a path", line("CONNECT /ok/x HTTP/1.1"),
		"CONNECT with a body", "CONNECT app:443 HTTP/1.1\r\nHost: app:443\r\nContent-Length: 5\r\n\r\nhello"+smuggled,
	), refused(505,
		"HTTP/1.2", line("GET /ok/x HTTP/1.2"),
		"HTTP/0.9 spelt out", line("GET /ok/x HTTP/0.9"),
		"HTTP/2.0", line("GET /ok/x HTTP/2.0"),
		"HTTP/9.9", line("GET /ok/x HTTP/9.9"),
	), rows(vector{status: []int{505}, body: -1, preface: true},
		"preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	), passed("GET /ok/x", 0, "absolute form", line("GET http://app/ok/x HTTP/1.1")),
		passed("GET /ok/x", 0, "absolute form in capitals", line("GET HTTP://APP/ok/x HTTP/1.1")),
		answered(403,
			"absolute form without a path", line("GET http://app HTTP/1.1"),
			"absolute form with dots", line("GET http://app/ok/../admin HTTP/1.1"),
			"a lower-case method", line("get /ok/x HTTP/1.1"),
			"a method that is not allowed", line("DELETE /ok/x HTTP/1.1"),
			"TRACE", line("TRACE /ok/x HTTP/1.1"),
			"OPTIONS *", line("OPTIONS * HTTP/1.1"),
			"override of the method", "DELETE /ok/x HTTP/1.1\r\nHost: app\r\nX-HTTP-Method-Override: GET\r\n\r\n",
		), rows(vector{status: []int{403, 200}, seen: []string{"GET /canary"}, body: -1, mayClose: true},
			"another method with a body", "PUT /ok/x HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\n\r\nhello",
			"denied with a request as its body", fmt.Sprintf("POST /admin HTTP/1.1\r\nHost: app\r\nContent-Length: %d\r\n\r\n%s", len(smuggled), smuggled),
			"denied with a request as its chunk", fmt.Sprintf("POST /admin HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled),
		), cut(
			"denied with a chunk that is none", "POST /admin HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n"+smuggled,
		))
}

func hosts() []vector {
	with := func(lines string) string { return "GET /ok/x HTTP/1.1\r\n" + lines + "\r\n" }
	out := refused(400,
		"no host", with(""),
		"two hosts", with("Host: app\r\nHost: app\r\n"),
		"two different hosts", with("Host: app\r\nHost: other\r\n"),
		"host behind a space", with("Host : app\r\n"),
		"absolute form without host", "GET http://app/ok/x HTTP/1.1\r\n\r\n",
		"HTTP/1.0 without host", "GET /ok/x HTTP/1.0\r\n\r\n",
	)
	for _, h := range []string{
		"", "a,b", "a b", "a/b", "a?b", "a#b", "u@a", "a:b", "a:", "a:65536", "a:1:2", "[::1", "[::1]x", "[fe80::1%25eth0]", "%61", "a\\b", "a\x00", "a\t b", "a;b",
		"é", ":80", "app:80@other",
	} {
		out = append(out, refused(400, fmt.Sprintf("host %q", h), with("Host: "+h+"\r\n"))...)
	}
	return slices.Concat(out,
		passed("GET /ok/x", 0, "host in capitals", with("Host: APP\r\n")),
		passed("GET /ok/x", 0, "host with a dot", with("Host: app.\r\n")),
		passed("GET /ok/x", 0, "host is IPv6", with("Host: [::1]:80\r\n")),
	)
}

func switches() []vector {
	return slices.Concat(refused(501,
		"h2c", head("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n")+"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"h2c without connection", head("Upgrade: h2c\r\n"),
		"TLS", head("Connection: upgrade\r\nUpgrade: TLS/1.0\r\n"),
		"websocket and h2c", head("Connection: upgrade\r\nUpgrade: websocket, h2c\r\n"),
	), refused(400,
		"websocket by POST", post("Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n", "hello"),
		"websocket with a body", head("Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 60\r\n")+smuggled,
		"two expects", post("Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 5\r\n", "hello"),
	), refused(501,
		"two upgrades", head("Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n"),
	), refused(417,
		"another expect", post("Expect: 200-ok\r\nContent-Length: 5\r\n", "hello"),
		"two values of expect", post("Expect: 100-continue, 100-continue\r\nContent-Length: 5\r\n", "hello"),
		"an empty expect", post("Expect:\r\nContent-Length: 5\r\n", "hello"),
	), passed("GET /ok/x", 0, "websocket that is refused", head("Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n")))
}

func paths() []vector {
	var out []vector
	for _, p := range []string{
		"/", "/admin", "/ok", "/ok/../admin", "/ok/../", "/ok/..", "/ok/x/../../admin", "/ok/./../admin", "/ok/%2e%2e/admin", "/ok/%2E%2E/admin", "/ok/.%2e/admin",
		"/ok/x/%2e%2e/%2e%2e/admin", "//admin", "///admin", "/ok//../admin", "/ok/..//admin", "/./admin", "/%61dmin", "/OK/x", "/ok;/x", "/ok%3b/x", "/ok%3B/../admin",
		"/canary/", "/canary/..", "/canary;x", "/%6fk", "/../admin", "/../../admin", "/ok/../../admin", "/ok/secret", "/ok//secret", "/ok/./secret", "/ok/x/../secret",
		"/ok/%73ecret", "/ok/secret;x", "/ok/secret/", "/ok/secret%3Bx", "/ok/x/%2e./secret", "/canaryx", "/ok/secret?x=/ok/x", "/admin?/ok/x", "/admin?/../ok/x", "/admin;/ok/x",
	} {
		out = append(out, answered(403, "path "+p, get(p))...)
	}
	for _, p := range []string{
		"/ok/..%2fadmin", "/ok/..%2Fadmin", "/ok%2f..%2fadmin", "/ok/%2e%2e%2fadmin", "/ok/..;/admin", "/ok/..;x/admin", "/ok/.;/x", "/ok/%2e%2e;x/admin", "/ok/..\\admin",
		"/ok/..%5cadmin", "/ok\\..\\admin", "/ok/x%00", "/ok/%00/../admin", "/ok/x%0d%0aX-A:%20b", "/ok/x%0a", "/ok/x%7f", "/ok/%c0%ae%c0%ae/admin", "/ok/%c0%af", "/ok/%ff",
		"/ok/%e0%80%af", "/ok/%ed%a0%80", "/ok/%252f/..;/x",
	} {
		out = append(out, refused(400, "path "+p, get(p))...)
	}
	for _, p := range []string{"/ok/x#a", "/ok/%", "/ok/%2", "/ok/%zz", "/ok/%u002e", "/ok/\x00", "/ok/\x7f", "/ok/\xc3\xa9", "/ok/x\tx", "#", "?x", "../ok/x", "\\ok\\x"} {
		out = append(out, refused(400, fmt.Sprintf("path %q", p), get(p))...)
	}
	for p, seen := range map[string]string{
		"/ok/%252e%252e/admin": "/ok/%252e%252e/admin", "/ok/%252e%252e%252fadmin": "/ok/%252e%252e%252fadmin", "//ok/x": "/ok/x", "/ok//x": "/ok/x", "/ok/a/../x": "/ok/x",
		"/ok/./x": "/ok/x", "/ok/%78": "/ok/x", "/%6f%6b/x": "/ok/x", "/admin/../ok/x": "/ok/x", "/ok/x;a=b": "/ok/x;a=b", "/ok/.../x": "/ok/.../x", "/ok/x..": "/ok/x..",
		"/ok/..x": "/ok/..x", "/ok/%20x": "/ok/%20x", "/ok/%c3%a9": "/ok/%C3%A9", "/ok/a%3fb": "/ok/a%3Fb", "/ok/a%23b": "/ok/a%23b", "/ok/x?%2e%2e/": "/ok/x?%2e%2e/", "/ok/x?": "/ok/x?",
		"/ok/x?a?b": "/ok/x?a?b", "/ok/": "/ok/", "/ok/x/.": "/ok/x/", "/ok/x/y/..": "/ok/x/", "/ok/%2525": "/ok/%2525", "/ok/secre%2574": "/ok/secre%2574",
	} {
		out = append(out, passed("GET "+seen, 0, "path "+p, get(p))...)
	}
	slices.SortStableFunc(out, func(a, b vector) int { return strings.Compare(a.name, b.name) })
	return out
}

func shortBodies() []vector {
	return slices.Concat(cut(
		"body shorter by one", post(fmt.Sprintf("Content-Length: %d\r\n", len(canary)+1), ""),
		"body much shorter", post("Content-Length: 100000\r\n", "hello"),
		"body endless", post("Content-Length: 999999999999999999\r\n", "hello"),
		"chunk shorter", chunked("fff\r\nhello"),
		"chunk size shorter", chunked("5"),
		"expect and no body", post("Expect: 100-continue\r\nContent-Length: 100000\r\n", ""),
	), rows(vector{status: []int{200, 400}, seen: []string{"POST /ok/x"}, body: 5},
		"body longer, no request", post("Content-Length: 5\r\n", "hello\x00\x01\x02\r\n\r\n"),
		"body longer by one", post("Content-Length: 5\r\n", "hello\n"),
		"body longer by a CRLF", post("Content-Length: 5\r\n", "hello\r\n"),
	), rows(vector{status: []int{200, 403, 200}, seen: []string{"POST /ok/x", "GET /canary"}, body: 5},
		"body longer by a request", post("Content-Length: 5\r\n", "hello"+smuggled),
	), cut(
		"head without an end", "GET /ok/x HTTP/1.1\r\nHost: app\r\nX-A: ",
	), rows(vector{status: []int{400}, body: -1},
		"head ends in the canary", "GET /ok/x HTTP/1.1\r\nHost: app\r\n",
	))
}
