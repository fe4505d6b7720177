package http1

// ExpectsBody names the methods whose requests say so when they have no body (RFC
// 9110 section 8.6).
func ExpectsBody(method []byte) bool {
	switch string(method) {
	case "POST", "PUT", "PATCH":
		return true
	default:
		return false
	}
}

// Repeatable names the methods that may be sent twice (RFC 9110 section 9.2.2).
func Repeatable(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE":
		return true
	default:
		return false
	}
}
