package dataplane

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// accessBuffer is how many bytes of lines wait for the disk; one line more is dropped and counted.
	accessBuffer = 1 << 20
	// accessGap is how long lines are gathered before they are written.
	accessGap = 50 * time.Millisecond
	// accessLook is how often it is looked whether the file at the path still is the one that is open, and how long an open that
	// failed is not tried again.
	accessLook = time.Second
	// accessEnd is how long the end of the process waits for the last lines.
	accessEnd = 2 * time.Second
	// maxLoggedPath bounds the path and the authority of a line.
	maxLoggedPath = 4096
)

// accessLog writes one line per request and TCP connection. A request never waits for it: lines go to a bounded buffer, which
// one goroutine writes. Off costs one atomic load per request.
type accessLog struct {
	on        atomic.Bool
	log       *slog.Logger
	lines     prometheus.Counter
	full      prometheus.Counter // lines lost to a full buffer
	unwritten prometheus.Counter // lines lost to the file
	wake      chan struct{}      // something to do for the writer

	mu     sync.Mutex
	target string // a path, or proxy.AccessLogStdout
	buf    []byte
	count  int // lines in buf
	reopen bool
}

func newAccessLog(log *slog.Logger, r prometheus.Registerer) (*accessLog, error) {
	dropped := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mesh_access_log_dropped_total", Help: "Lines of the access log that were lost, by reason.",
	}, []string{"reason"})
	a := &accessLog{
		log: log, wake: make(chan struct{}, 1),
		lines: prometheus.NewCounter(prometheus.CounterOpts{Name: "mesh_access_log_lines_total", Help: "Lines of the access log that were written."}),
		full:  dropped.WithLabelValues("full"), unwritten: dropped.WithLabelValues("write"),
	}
	return a, errors.Join(r.Register(a.lines), r.Register(dropped))
}

// configure turns the log on or off. It does no I/O: a target that can't be opened never holds up a plan.
func (a *accessLog) configure(target string) {
	a.mu.Lock()
	changed := a.target != target
	a.target = target
	a.on.Store(target != "")
	a.mu.Unlock()
	if changed {
		a.notify()
	}
}

// again opens the file anew before the next line.
func (a *accessLog) again() {
	a.mu.Lock()
	a.reopen = true
	a.mu.Unlock()
	a.notify()
}

func (a *accessLog) notify() {
	select {
	case a.wake <- struct{}{}:
	default: // it is to look anyway
	}
}

// accessEntry is what a line tells.
type accessEntry struct {
	kind                string // http or tcp
	direction           direction
	source, destination spiffe.ID
	endpoint, peer      string
	request             *l7.Record // nil of a connection
	sent, received      int64      // sent is from source to destination
	duration            time.Duration
	decision            intentions.Decision
	reason              string
	grpc                string // its status
	protocol, asked     string // of a connection: what was detected, and the name that TLS asks for
}

// request tells of a finished exchange; of is nil if it was refused before the handler was asked.
func (a *accessLog) request(side direction, r *l7.Record, of *attempt) {
	e := accessEntry{
		kind: "http", direction: side, source: r.Source, endpoint: r.Endpoint, request: r,
		sent: r.RequestBytes, received: r.ResponseBytes, duration: r.Duration, reason: r.Reason.String(),
	}
	e.decision.Rule = -1
	if of != nil {
		e.destination, e.decision, e.peer = of.target, of.decision, of.link.remote()
		if of.grpc {
			e.grpc = statusName(of.status)
		}
	}
	a.add(&e)
}

// connection tells of a TCP connection that ended, or of one that was refused.
func (a *accessLog) connection(l *link, sent, received int64, reason Reason) {
	if !a.on.Load() {
		return
	}
	a.add(&accessEntry{
		kind: "tcp", direction: l.direction, source: l.source, destination: l.target, endpoint: l.endpoint, peer: l.remote(),
		sent: sent, received: received, duration: time.Since(l.started), decision: l.decision, reason: string(reason),
		protocol: l.speaks, asked: l.asked,
	})
}

// handshake tells of a connection on the mesh port whose caller did not prove who he is.
func (a *accessLog) handshake(peer net.Addr, took time.Duration, reason Reason) {
	if !a.on.Load() {
		return
	}
	e := accessEntry{kind: "tcp", direction: inbound, peer: peer.String(), duration: took, reason: string(reason)}
	e.decision.Rule = -1
	a.add(&e)
}

// remote is the address of the side that opened the connection.
func (l *link) remote() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sides[0] == nil {
		return ""
	}
	if addr, ok := l.sides[0].RemoteAddr().(*net.TCPAddr); ok {
		ap := addr.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
	}
	return ""
}

func (a *accessLog) add(e *accessEntry) {
	var scratch [1 << 10]byte
	line := e.append(scratch[:0], time.Now())
	a.mu.Lock()
	if len(a.buf)+len(line) > accessBuffer {
		a.mu.Unlock()
		a.full.Inc()
		return
	}
	first := a.count == 0
	a.buf = append(a.buf, line...)
	a.count++
	a.mu.Unlock()
	if first {
		a.notify()
	}
}

// append writes the line. Members that say nothing are left out.
func (e *accessEntry) append(b []byte, now time.Time) []byte {
	b = append(b, `{"time":"`...)
	b = now.Add(-e.duration).UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = append(b, `","kind":"`...)
	b = append(b, e.kind...)
	b = append(b, `","direction":"`...)
	b = append(b, e.direction...)
	b = append(b, '"')
	b = appendID(b, "source", e.source)
	b = appendID(b, "destination", e.destination)
	b = appendMember(b, "endpoint", e.endpoint)
	b = appendMember(b, "peer", e.peer)
	b = appendMember(b, "protocol", e.protocol)
	b = appendMember(b, "server_name", e.asked)
	if r := e.request; r != nil {
		b = appendMember(b, "method", r.Method)
		b = appendMember(b, "authority", r.Authority[:min(len(r.Authority), maxLoggedPath)])
		b = appendMember(b, "path", r.Path[:min(len(r.Path), maxLoggedPath)])
		b = append(b, `,"status":`...)
		b = strconv.AppendInt(b, int64(r.Status), 10)
		b = appendMember(b, "grpc_status", e.grpc)
	}
	b = append(b, `,"bytes_sent":`...)
	b = strconv.AppendInt(b, e.sent, 10)
	b = append(b, `,"bytes_received":`...)
	b = strconv.AppendInt(b, e.received, 10)
	b = append(b, `,"duration_ms":`...)
	b = strconv.AppendFloat(b, float64(e.duration)/float64(time.Millisecond), 'f', 3, 64)
	b = appendMember(b, "reason", e.reason)
	if e.decision.Reason != intentions.ReasonNone {
		b = appendMember(b, "decision", string(e.decision.Reason))
	}
	if e.decision.Key != (intentions.Key{}) {
		b = appendMember(b, "intention", e.decision.Key.String())
	}
	if e.decision.Rule >= 0 && e.decision.Reason == intentions.ReasonRule {
		b = append(b, `,"rule":`...)
		b = strconv.AppendInt(b, int64(e.decision.Rule), 10)
	}
	if e.request != nil {
		b = appendMember(b, "error_id", e.request.ErrorID)
	}
	return append(b, "}\n"...)
}

func appendID(b []byte, name string, id spiffe.ID) []byte {
	if id.Kind != spiffe.KindService {
		if id.IsZero() {
			return b
		}
		return appendMember(b, name, id.String())
	}
	b = append(b, `,"`...)
	b = append(b, name...)
	b = append(b, `":"spiffe://`...) // a valid identity has no byte that JSON would escape
	b = append(b, id.TrustDomain...)
	b = append(b, "/ns/"...)
	b = append(b, id.Namespace...)
	b = append(b, "/svc/"...)
	b = append(b, id.Name...)
	return append(b, '"')
}

// appendMember appends a member whose value is a string, unless that is empty. Bytes from the wire may be anything: what is no
// UTF-8 becomes U+FFFD, as in encoding/json (RFC 8259, 7 and 8.1).
func appendMember[T string | []byte](b []byte, name string, value T) []byte {
	if len(value) == 0 {
		return b
	}
	b = append(b, `,"`...)
	b = append(b, name...)
	b = append(b, `":"`...)
	for i := 0; i < len(value); {
		c := value[i]
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < 0x20 || c == 0x7f:
			const hex = "0123456789abcdef"
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		case c < utf8.RuneSelf:
			b = append(b, c)
		default:
			r, n := decodeRune(value[i:])
			b = utf8.AppendRune(b, r) // RuneError is U+FFFD
			i += n
			continue
		}
		i++
	}
	return append(b, '"')
}

func decodeRune[T string | []byte](value T) (rune, int) {
	var head [utf8.UTFMax]byte
	return utf8.DecodeRune(head[:copy(head[:], value)])
}

// start begins to write. The function that it returns writes what is left, and ends it.
func (a *accessLog) start() (stop func()) {
	ending, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		w := accessWriter{accessLog: a}
		defer w.close()
		for {
			select {
			case <-a.wake:
			case <-ending:
				w.flush()
				return
			}
			gap := time.NewTimer(accessGap)
			select {
			case <-gap.C:
			case <-ending:
				gap.Stop()
			}
			w.flush()
		}
	}()
	return func() {
		close(ending)
		late := time.NewTimer(accessEnd)
		defer late.Stop()
		select {
		case <-ended:
		case <-late.C: // whoever reads our output does not
		}
	}
}

// accessWriter is what the goroutine that writes has open.
type accessWriter struct {
	*accessLog
	spare   []byte
	out     io.WriteCloser
	file    *os.File // nil for standard output
	path    string   // of out
	looked  time.Time
	refused time.Time // when opening failed last
	failing bool
}

// flush writes what waits.
func (w *accessWriter) flush() {
	w.mu.Lock()
	lines, count, target, reopen := w.buf, w.count, w.target, w.reopen
	w.buf, w.count, w.reopen = w.spare[:0], 0, false
	w.spare = lines
	if target == "" { // off: the buffers go, too
		w.buf, w.spare = nil, nil
	}
	w.mu.Unlock()
	if target == "" { // what was said before it was turned off has its place still
		defer w.close()
		target = w.path
	}
	if reopen || target != w.path {
		w.close()
		w.refused = time.Time{}
	}
	if count == 0 {
		return
	}
	now := time.Now()
	err := w.open(target, now)
	if err == nil {
		if w.file != nil { // a FIFO that is not read must not hold us; a plain file knows no deadline
			_ = w.file.SetWriteDeadline(now.Add(accessLook))
		}
		_, err = w.out.Write(lines)
	}
	if err == nil {
		w.lines.Add(float64(count))
		w.failing = false
		return
	}
	w.unwritten.Add(float64(count))
	if !w.failing {
		w.log.Error("the access log can't be written; lines are dropped until it can", slog.String("target", target), slog.Any("error", err))
	}
	w.failing = true
	w.close()
}

// errRefused stands for the error that opening gave less than accessLook ago.
var errRefused = errors.New("it could not be opened a moment ago")

// open sees to it that out is the target. A file that was moved away, or removed, is opened anew under its name.
func (w *accessWriter) open(target string, now time.Time) error {
	if w.out != nil && w.file != nil && now.Sub(w.looked) >= accessLook {
		w.looked = now
		have, err := w.file.Stat()
		there, err2 := os.Stat(target)
		if err != nil || err2 != nil || !os.SameFile(have, there) {
			w.close()
		}
	}
	switch {
	case w.out != nil:
		return nil
	case target == proxy.AccessLogStdout:
		w.out, w.file, w.path = keepOpen{os.Stdout}, nil, target
		return nil
	case now.Sub(w.refused) < accessLook:
		return errRefused
	}
	// Without O_NONBLOCK, a FIFO that nobody reads would hold us here.
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o640) //nolint:gosec // the operator's own choice
	if err != nil {
		w.refused = now
		return err
	}
	w.out, w.file, w.path, w.looked = f, f, target, now
	return nil
}

func (w *accessWriter) close() {
	if w.out != nil {
		if err := w.out.Close(); err != nil && !w.failing {
			w.log.Warn("the access log ended with an error", slog.Any("error", err))
		}
	}
	w.out, w.file, w.path = nil, nil, ""
}

// keepOpen is not ours to close.
type keepOpen struct{ io.Writer }

// Close implements io.Closer.
func (keepOpen) Close() error { return nil }
