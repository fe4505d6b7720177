package feed

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Link connects a mesh-proxy with the one that takes its place: a socket pair that the second inherits. Frames of kind "step" say
// how far they are, "sockets" pass the listening sockets, "counters" what the first has counted. One goroutine reads and one
// writes; the zero value is of no use.
type Link struct{ conn *conn }

// Heir is where two processes stand, see Step.
type Heir string

// The steps, in their order. Whatever goes wrong before Serve leaves the first process as it was.
const (
	// HeirTake is the first process's word that it has passed all its sockets.
	HeirTake Heir = "take"
	// HeirReady: the second has a plan in force, and could accept.
	HeirReady Heir = "ready"
	// HeirServe: the first lets it.
	HeirServe Heir = "serve"
	// HeirServing: the second accepts. The first stops to, and drains.
	HeirServing Heir = "serving"
	// HeirEnd asks the first to be done Within a time: the second is told to stop.
	HeirEnd Heir = "end"
)

// Step tells the other process how far this one is.
type Step struct {
	To Heir `json:"to"`
	// Within goes with HeirEnd, in nanoseconds.
	Within time.Duration `json:"within,omitempty"`
}

// Counters are all that a process, and those before it, have counted: metric families as delimited protocol buffers. All frames up
// to the first without More are one; the newest stands for all before.
type Counters struct {
	Families []byte `json:"families,omitempty"`
	More     bool   `json:"more,omitempty"`
	// Generations is how many processes drain: this one, and those before it.
	Generations int `json:"generations"`
}

// NewLinkPair returns our end of a new link, and the other one for a process to inherit, which the caller closes.
func NewLinkPair() (ours *Link, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a pair of sockets: %w", err)
	}
	theirs = os.NewFile(uintptr(pair[1]), "link")
	if ours, err = NewLink(os.NewFile(uintptr(pair[0]), "link")); err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// NewLink makes a link of an inherited end, which it takes.
func NewLink(f *os.File) (*Link, error) {
	nc, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("use an inherited socket: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		_ = nc.Close()
		return nil, fmt.Errorf("use an inherited socket: it is no unix socket but %s", nc.LocalAddr().Network())
	}
	return &Link{conn: newConn(uc)}, nil
}

// Read returns the next frame, and the descriptors that came with it, which are the caller's. It blocks until by, for ever if that
// is zero; io.EOF is the end of the other process.
func (l *Link) Read(by time.Time) (Frame, []*os.File, error) {
	if err := l.conn.uc.SetReadDeadline(by); err != nil {
		return Frame{}, nil, fmt.Errorf("read from the other process: %w", err)
	}
	f, files, err := l.conn.read()
	if err != nil {
		closeFiles(l.conn.received)
		l.conn.received = nil
	}
	return f, files, err
}

// Write sends a frame.
func (l *Link) Write(f Frame) error { return l.conn.write(f, nil) }

// WriteSockets passes sockets, which stay the caller's.
func (l *Link) WriteSockets(sockets map[string]*os.File) error {
	var names []string
	var files []*os.File
	for name, file := range sockets {
		names, files = append(names, name), append(files, file)
		if len(names) == maxDescriptors {
			if err := l.conn.write(Frame{Sockets: &Sockets{Names: names}}, files); err != nil {
				return err
			}
			names, files = nil, nil
		}
	}
	if len(names) == 0 {
		return nil
	}
	return l.conn.write(Frame{Sockets: &Sockets{Names: names}}, files)
}

// WriteCounters sends what was counted, in as many frames as it takes.
func (l *Link) WriteCounters(families []byte, generations int) error {
	for len(families) > maxPayload {
		if err := l.Write(Frame{Counters: &Counters{Families: families[:maxPayload], More: true, Generations: generations}}); err != nil {
			return err
		}
		families = families[maxPayload:]
	}
	return l.Write(Frame{Counters: &Counters{Families: families, Generations: generations}})
}

// Close ends the link. A Read that blocks returns.
func (l *Link) Close() { _ = l.conn.uc.Close() }
