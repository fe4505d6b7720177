package http1

import "strconv"

// The functions below append wire bytes to dst and return the longer slice.
// They trust their arguments: whatever comes from a peer has passed a parser.

// AppendRequestLine appends the request line in origin form.
func AppendRequestLine(dst, method, path, query []byte, hasQuery bool) []byte {
	dst = append(dst, method...)
	dst = append(dst, ' ')
	dst = append(dst, path...)
	if hasQuery {
		dst = append(dst, '?')
		dst = append(dst, query...)
	}
	return append(dst, " HTTP/1.1\r\n"...)
}

// AppendStatusLine appends a status line. An empty reason is replaced by the
// registered one where the status is a common one.
func AppendStatusLine(dst []byte, status int, reason []byte) []byte {
	if status == 200 && (len(reason) == 0 || string(reason) == "OK") {
		return append(dst, "HTTP/1.1 200 OK\r\n"...)
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(status), 10)
	dst = append(dst, ' ')
	if len(reason) > 0 {
		dst = append(dst, reason...)
	} else {
		dst = append(dst, statusText(status)...)
	}
	return append(dst, '\r', '\n')
}

// AppendField appends one field line.
func AppendField[T string | []byte](dst []byte, name string, value T) []byte {
	dst = append(dst, name...)
	dst = append(dst, ':', ' ')
	dst = append(dst, value...)
	return append(dst, '\r', '\n')
}

// AppendFields appends field lines.
func AppendFields(dst []byte, fields Fields) []byte {
	for i := range fields {
		dst = append(dst, fields[i].Name...)
		dst = append(dst, ':', ' ')
		dst = append(dst, fields[i].Value...)
		dst = append(dst, '\r', '\n')
	}
	return dst
}

// AppendLength appends a Content-Length line.
func AppendLength(dst []byte, n int64) []byte {
	dst = append(dst, "Content-Length: "...)
	dst = strconv.AppendInt(dst, n, 10)
	return append(dst, '\r', '\n')
}

// AppendChunkSize appends the line before a chunk's data. n must be positive:
// 0 would end the body.
func AppendChunkSize(dst []byte, n int) []byte {
	dst = strconv.AppendInt(dst, int64(n), 16)
	return append(dst, '\r', '\n')
}

// AppendLastChunk appends the end of a chunked body and its trailers, without
// those that may not be trailers.
func AppendLastChunk(dst []byte, trailers Fields) []byte {
	dst = append(dst, "0\r\n"...)
	for i := range trailers {
		if !ForbiddenTrailer(trailers[i].ID) {
			dst = AppendFields(dst, trailers[i:i+1])
		}
	}
	return append(dst, '\r', '\n')
}

// Lines that are the same each time.
const (
	LineEnd       = "\r\n"
	LineChunked   = "Transfer-Encoding: chunked\r\n"
	LineClose     = "Connection: close\r\n"
	LineKeepAlive = "Connection: keep-alive\r\n"
	LineWebSocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
	LineExpect    = "Expect: 100-continue\r\n"
)

// statusText returns the registered reason phrase (RFC 9110 section 15).
func statusText(status int) string {
	switch status {
	case 100:
		return "Continue"
	case 101:
		return "Switching Protocols"
	case 103:
		return "Early Hints"
	case 200:
		return "OK"
	case 201:
		return "Created"
	case 204:
		return "No Content"
	case 206:
		return "Partial Content"
	case 304:
		return "Not Modified"
	case 400:
		return "Bad Request"
	case 403:
		return "Forbidden"
	case 404:
		return "Not Found"
	case 405:
		return "Method Not Allowed"
	case 408:
		return "Request Timeout"
	case 414:
		return "URI Too Long"
	case 417:
		return "Expectation Failed"
	case 429:
		return "Too Many Requests"
	case 431:
		return "Request Header Fields Too Large"
	case 500:
		return "Internal Server Error"
	case 501:
		return "Not Implemented"
	case 502:
		return "Bad Gateway"
	case 503:
		return "Service Unavailable"
	case 504:
		return "Gateway Timeout"
	case 505:
		return "HTTP Version Not Supported"
	default:
		return ""
	}
}
