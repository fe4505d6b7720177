package catalog

import (
	"io/fs"
	"path/filepath"
	"strconv"
)

// DefaultSocketMode is the mode of an upstream's unix socket.
const DefaultSocketMode = "0660"

// maxSocketPath is the room of sockaddr_un.sun_path (unix(7)) without its final
// zero byte.
const maxSocketPath = 107

// CheckSocketPath tells why path can't be that of a unix socket, or returns
// nil.
func CheckSocketPath(path string) error {
	var p Problems
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || !printable(path):
		p.Add("", "%q: write an absolute path without \"..\", such as \"/run/web/api.sock\"", path)
	case len(path) > maxSocketPath:
		p.Add("", "%q has %d bytes, a unix socket's path has at most %d: write a shorter one", path, len(path), maxSocketPath)
	}
	return p.Err()
}

// ParseSocketMode reads the permissions of a unix socket, an octal number up to
// 0777; empty is DefaultSocketMode. Who may write there may connect.
func ParseSocketMode(s string) (fs.FileMode, error) {
	if s == "" {
		s = DefaultSocketMode
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n == 0 || n > 0o777 {
		var p Problems
		p.Add("", "%q is no mode: write an octal number such as %q", s, DefaultSocketMode)
		return 0, p.Err()
	}
	return fs.FileMode(n), nil
}
