package load

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// alarmNumber is the alarm's at the poller.
const alarmNumber = 1 << 30

// patience is how long after the window an answer is waited for.
func (c *client) patience() time.Duration {
	if c.job.Slow > 0 {
		return time.Second // some proxies stop for ever
	}
	return 10 * time.Second
}

// Job is one measurement.
type Job struct {
	// Address is what is loaded, an IPv4 address with port.
	Address string `json:"address"`
	// Path is asked for, and answered with Length bytes. An empty Path reads an
	// endless stream instead.
	Path   string `json:"path,omitempty"`
	Length int    `json:"length,omitempty"`
	// Call is how it is asked for: over HTTP/1.1 if it is empty, else one of the
	// kinds over HTTP/2.
	Call string `json:"call,omitempty"`
	// Connections are opened at first and kept.
	Connections int `json:"connections"`
	// Streams are how many requests run at once on each connection of HTTP/2, and
	// Slow how many streams besides whose answers stay without room.
	Streams int `json:"streams,omitempty"`
	Slow    int `json:"slow,omitempty"`
	// Rate is how many requests are due per second, as a constant rate, taken by
	// the connection, or place for a stream, that has been idle for longest. At 0
	// each asks again as soon as it is answered.
	Rate int `json:"rate,omitempty"`
	// Warmup comes before the window, Window is what is measured.
	Warmup time.Duration `json:"warmup"`
	Window time.Duration `json:"window"`
	// Requests, if not 0, ends the window once so many were answered in it.
	Requests int `json:"requests,omitempty"`
	// Processes are whose cost counts, each with its descendants.
	Processes [][]int `json:"processes,omitempty"`
	// Counters are pages of metrics, of which Counter is read at both ends of
	// the window.
	Counters []string `json:"counters,omitempty"`
	Counter  string   `json:"counter,omitempty"`
}

// Result is what a job saw.
type Result struct {
	// Window is how long it was measured, about Job.Window.
	Window time.Duration `json:"window"`
	// Requests were answered, and Bytes of bodies or of the stream came, within.
	Requests int   `json:"requests"`
	Bytes    int64 `json:"bytes"`
	// Latencies are sorted: at a rate, of the requests that were due within the
	// window, from when they were due to the last byte of the answer; else of
	// those that were answered within, from when they were sent.
	Latencies []time.Duration `json:"-"`
	P50       time.Duration   `json:"p50"`
	P99       time.Duration   `json:"p99"`
	Max       time.Duration   `json:"max"`
	// CPU is what each of the processes took within the window, Private the
	// memory that it had at its end.
	CPU     []time.Duration `json:"cpu"`
	Private []uint64        `json:"private"`
	// Own is the CPU time of the client itself.
	Own time.Duration `json:"own"`
	// Counted is by how much each counter grew.
	Counted []float64 `json:"counted,omitempty"`
}

// conn is one connection of the client.
type conn struct {
	fd   int
	due  time.Duration // when the request on it should have been sent
	head []byte        // of a response, if it did not come whole
	left int           // bytes of the response's body to come; -1 before its head is there
	seen bool          // a response was looked at closely
}

// client carries a job out.
type client struct {
	job     Job
	poll    *poller
	alarm   alarm
	request []byte
	buf     []byte
	conns   []conn // of HTTP/2: its streams
	idle    []int  // connections without a request, the longest idle first; at a rate only
	links   []*h2conn
	touched []*h2conn // with something to write
	places  []place   // by connection
	fields  []hpack.HeaderField
	ask     []byte // message of a gRPC call

	base      time.Time
	schedule  schedule
	begun     int // requests of the schedule that were sent
	under     int // requests under way
	measuring bool
	done      bool // the window is over
	started   time.Duration
	before    reading
	out       Result
}

// reading is what the processes have taken so far.
type reading struct {
	cpu      []time.Duration
	own      time.Duration
	counters []float64
}

// Do carries a job out. It fails if an answer is not what it should be, or does
// not come. It blocks its thread; ctx is for what it asks other than the load.
func (j Job) Do(ctx context.Context) (out Result, err error) {
	c := &client{job: j, buf: make([]byte, 256<<10), schedule: schedule{j.Rate}}
	c.request = fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: api.default.mesh\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", j.Path)
	c.fields, c.ask = c.head(j.Path), message(SmallLength)
	if c.poll, err = newPoller(); err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if c.alarm, err = newAlarm(); err != nil {
		return Result{}, err
	}
	if err := c.poll.add(c.alarm.fd, alarmNumber); err != nil {
		return Result{}, err
	}
	if err := c.connect(); err != nil {
		return Result{}, err
	}
	if err := c.run(ctx); err != nil {
		return Result{}, err
	}
	slices.Sort(c.out.Latencies)
	if n := len(c.out.Latencies); n > 0 {
		c.out.P50, c.out.P99, c.out.Max = c.out.Latencies[n/2], c.out.Latencies[n*99/100], c.out.Latencies[n-1]
	}
	return c.out, nil
}

func (c *client) close() error {
	errs := []error{c.poll.close()}
	if c.alarm.fd != 0 {
		errs = append(errs, unix.Close(c.alarm.fd))
	}
	for _, co := range c.conns {
		if co.fd >= 0 {
			errs = append(errs, unix.Close(co.fd))
		}
	}
	for _, h := range c.links {
		errs = append(errs, unix.Close(h.fd))
	}
	return errors.Join(errs...)
}

func (c *client) now() time.Duration { return time.Since(c.base) }

// connect opens the connections and, but at a rate, sends on each.
func (c *client) connect() error {
	c.out.Latencies = make([]time.Duration, 0, 1<<20)
	c.base = time.Now()
	if c.job.Call != "" {
		if err := c.connect2(); err != nil {
			return err
		}
		c.base = time.Now() // the schedule begins
		return nil
	}
	for i := range c.job.Connections {
		fd, err := dial(c.job.Address)
		if err != nil {
			return err
		}
		c.conns = append(c.conns, conn{fd: fd, left: -1})
		if err := c.poll.add(fd, i); err != nil {
			return err
		}
		switch {
		case c.job.Path == "":
			if _, err := write(fd, []byte{0}); err != nil {
				return fmt.Errorf("ask for a stream: %w", err)
			}
		case c.job.Rate > 0:
			c.idle = append(c.idle, i)
		default:
			if err := c.send(i, c.now()); err != nil {
				return err
			}
		}
	}
	c.base = time.Now() // the schedule begins
	return nil
}

// run works until the window is over and, at a rate, everything that was due in
// it is answered.
func (c *client) run(ctx context.Context) error {
	for {
		now := c.now()
		if err := c.turn(ctx, now); err != nil {
			return err
		}
		waiting := c.job.Rate > 0 && (c.under > 0 || c.schedule.at(c.begun) < c.end())
		if c.done && !waiting {
			return nil
		}
		if now > c.end()+c.patience() {
			return fmt.Errorf("%d requests were not answered within %s after the window", c.under, c.patience())
		}
		if err := errors.Join(c.pace(), c.flush()); err != nil {
			return err
		}
		events, err := c.poll.wait(100)
		if err != nil {
			return err
		}
		for _, e := range events {
			if e.Fd == alarmNumber {
				c.alarm.quiet()
			} else if err := c.receive(int(e.Fd)); err != nil {
				return err
			}
		}
	}
}

// end is when the window ends, by the schedule.
func (c *client) end() time.Duration { return c.job.Warmup + c.job.Window }

// turn begins and ends the window.
func (c *client) turn(ctx context.Context, now time.Duration) (err error) {
	switch {
	case !c.measuring && !c.done && now >= c.job.Warmup:
		if c.before, err = c.read(ctx); err != nil {
			return err
		}
		c.measuring, c.started = true, c.now()
	case c.measuring && (now >= c.end() || c.job.Requests > 0 && c.out.Requests >= c.job.Requests):
		c.measuring, c.done = false, true
		c.out.Window = c.now() - c.started
		after, err := c.read(ctx)
		if err != nil {
			return err
		}
		c.out.Own = after.own - c.before.own
		for i := range after.cpu {
			c.out.CPU = append(c.out.CPU, after.cpu[i]-c.before.cpu[i])
		}
		for i := range after.counters {
			c.out.Counted = append(c.out.Counted, after.counters[i]-c.before.counters[i])
		}
		for _, pids := range c.job.Processes {
			memory, err := MemoryOf(pids)
			if err != nil {
				return err
			}
			c.out.Private = append(c.out.Private, memory.Private)
		}
	}
	return nil
}

func (c *client) read(ctx context.Context) (out reading, err error) {
	for _, url := range c.job.Counters {
		v, err := Scrape(ctx, url, c.job.Counter)
		if err != nil {
			return out, err
		}
		out.counters = append(out.counters, v)
	}
	for _, pids := range c.job.Processes {
		cpu, err := CPU(pids)
		if err != nil {
			return out, err
		}
		out.cpu = append(out.cpu, cpu)
	}
	out.own, err = CPU([]int{unix.Getpid()})
	return out, err
}

// pace sends what is due, at a rate, as long as a connection is idle, and sets
// the alarm for the next; the last is the end of the window.
func (c *client) pace() error {
	if c.job.Rate == 0 {
		return nil
	}
	for len(c.idle) > 0 {
		due := c.schedule.at(c.begun)
		last := due >= c.end()
		if last && c.done {
			return nil
		}
		if wait := min(due, c.end()) - c.now(); wait > 0 || last {
			return c.alarm.set(wait)
		}
		i := c.idle[0]
		c.idle = append(c.idle[:0], c.idle[1:]...)
		c.begun++
		if err := c.send(i, due); err != nil {
			return err
		}
	}
	return nil
}

// send sends the request on an idle connection.
func (c *client) send(i int, due time.Duration) error {
	co := &c.conns[i]
	co.due, co.left = due, -1
	c.under++
	if c.job.Call != "" {
		co.left = c.job.Length
		return c.send2(i)
	}
	n, err := write(co.fd, c.request)
	if err == nil && n < len(c.request) {
		err = errors.New("the socket does not take a request of 100 bytes")
	}
	if err != nil {
		return fmt.Errorf("send to %s: %w", c.job.Address, err)
	}
	return nil
}

// receive takes what came on a connection.
func (c *client) receive(i int) error {
	if c.job.Call != "" {
		return c.receive2(i)
	}
	co := &c.conns[i]
	n, err := read(co.fd, c.buf)
	if err == errAgain { //nolint:errorlint // our own, never wrapped
		return nil
	}
	if err == nil && n == 0 {
		err = errors.New("the connection was closed")
	}
	if err != nil {
		return fmt.Errorf("receive from %s: %w", c.job.Address, err)
	}
	if c.measuring {
		c.out.Bytes += int64(n)
	}
	if c.job.Path == "" {
		return nil
	}
	whole, err := co.take(c.buf[:n], c.job.Length)
	if err != nil || !whole {
		return err
	}
	return c.answered(i)
}

// answered notes that a response is complete.
func (c *client) answered(i int) error {
	co := &c.conns[i]
	now := c.now()
	c.under--
	if c.measuring {
		c.out.Requests++
	}
	if c.job.Rate > 0 {
		if co.due >= c.job.Warmup && co.due < c.end() {
			c.out.Latencies = append(c.out.Latencies, now-co.due)
		}
		c.idle = append(c.idle, i)
		return nil
	}
	if c.measuring {
		c.out.Latencies = append(c.out.Latencies, now-co.due)
	}
	if c.done {
		return nil
	}
	return c.send(i, now)
}

// take takes bytes of a response whose body should have so many, and tells
// whether it is complete.
func (co *conn) take(data []byte, length int) (whole bool, err error) {
	if co.left < 0 {
		if len(co.head) > 0 {
			co.head = append(co.head, data...)
			data = co.head
		}
		end := bytes.Index(data, []byte("\r\n\r\n"))
		if end < 0 {
			co.head = append(co.head[:0:0], data...)
			return false, nil
		}
		if err := co.check(data[:end+2], length); err != nil {
			return false, err
		}
		co.head, co.left = nil, length
		data = data[end+4:]
	}
	co.left -= len(data)
	if co.left < 0 {
		return false, fmt.Errorf("a response has %d bytes more than the %d that it should have", -co.left, length)
	}
	return co.left == 0, nil
}

// check looks at a response's head: closely at the first of a connection.
func (co *conn) check(head []byte, length int) error {
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return fmt.Errorf("not a 200 response: %q", head)
	}
	if co.seen {
		return nil
	}
	co.seen = true
	for line := range bytes.Lines(head) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if !bytes.EqualFold(name, []byte("content-length")) {
			continue
		}
		if got := string(bytes.TrimSpace(value)); got != strconv.Itoa(length) {
			return fmt.Errorf("a response of %s bytes, want %d", got, length)
		}
		return nil
	}
	return fmt.Errorf("a response without a length: %q", head)
}

// PerRequest is the CPU time of all processes per request.
func (r Result) PerRequest() time.Duration {
	var sum time.Duration
	for _, d := range r.CPU {
		sum += d
	}
	return sum / time.Duration(cmp.Or(r.Requests, 1))
}
