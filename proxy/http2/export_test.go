package http2

// Writing reports whether the connection's writer exists: it ends when the
// connection is idle.
func (c *Conn) Writing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running
}
