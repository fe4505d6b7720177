package conformance_test

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const (
	trustDomain = "mesh.test"
	// patience bounds every wait for what must come.
	patience = 10 * time.Second
	// straggle bounds the wait for what may come.
	straggle = 100 * time.Millisecond
)

// stand is one application behind a pair of proxies.
type stand struct {
	app       string
	pair      *rig.Pair
	authority *rig.Authority
	web       *ca.Leaf
	recorder  *recorder
	allowed   *tally
	fences    int
}

// tally counts the decisions of the callee's proxy that allowed a request,
// as its log tells them.
type tally struct {
	mu              sync.Mutex
	allowed, fences int
	changed         chan struct{}
	last            []string // lines of the log
}

// lastLines is how much of the log is told with a failure.
const lastLines = 30

func (c *tally) line(line string) {
	c.mu.Lock()
	if len(c.last) == lastLines {
		c.last = slices.Delete(c.last, 0, 1)
	}
	c.last = append(c.last, line)
	c.mu.Unlock()
	if !strings.Contains(line, ` msg="intention decided" `) || !strings.Contains(line, " allowed=true ") {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if strings.HasSuffix(line, fenceRule) {
		c.fences++
	} else {
		c.allowed++
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// log returns the last lines of the log.
func (c *tally) log() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.last, "\n")
}

// take waits until the n-th fence was told of, and returns how many other
// requests were allowed since the last call.
func (c *tally) take(n int) (int, bool) {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		c.mu.Lock()
		allowed, fences, changed := c.allowed, c.fences, c.changed
		if fences >= n {
			c.allowed = 0
			c.mu.Unlock()
			return allowed, true
		}
		c.mu.Unlock()
		select {
		case <-changed:
		case <-timeout.C:
			return allowed, false
		}
	}
}

// fenceRule ends the log line of a request that the rule for fences allowed,
// the fourth.
const fenceRule = " rule=3"

// rules are the policy before every application.
func rules() []intentions.Intention {
	return []intentions.Intention{{Source: "web", Destination: "*", Rules: []intentions.Rule{
		{Action: intentions.Deny, PathPrefix: "/ok/secret"},
		{Action: intentions.Allow, Methods: []string{"GET", "POST", "HEAD"}, PathPrefix: "/ok/"},
		{Action: intentions.Allow, Methods: []string{"GET"}, Path: "/canary"},
		{Action: intentions.Allow, Methods: []string{"GET"}, PathPrefix: "/fence/"},
	}}}
}

// permitted says the same in other words and shares no code with the mesh: a
// server must see nothing else. It takes what the application saw, raw or
// decoded.
func permitted(method, path string) error {
	lower := strings.ToLower(path)
	for _, part := range []string{"//", "/./", "/../", "\\", "%2f", "%5c", "%00", "%2e", "\x00", "smuggled"} {
		if strings.Contains(lower, part) {
			return fmt.Errorf("%q has %q", path, part)
		}
	}
	switch {
	case strings.HasSuffix(path, "/..") || strings.HasSuffix(path, "/."):
		return fmt.Errorf("%q ends in a dot segment", path)
	case strings.HasPrefix(path, "/ok/secret"):
		return fmt.Errorf("%q is secret", path)
	case strings.HasPrefix(path, "/ok/") && slices.Contains([]string{"GET", "POST", "HEAD"}, method):
		return nil
	case method == "GET" && (path == "/canary" || strings.HasPrefix(path, "/fence/")):
		return nil
	default:
		return fmt.Errorf("%s %q is not allowed", method, path)
	}
}

func newStand(t *testing.T, name string, start application) *stand {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh-") //nolint:usetesting // the path of t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s := &stand{app: name, recorder: newRecorder(), allowed: &tally{changed: make(chan struct{})}}
	if s.authority, err = rig.NewAuthority(trustDomain); err != nil {
		t.Fatal(err)
	}
	web := spiffe.Service(trustDomain, catalog.DefaultNamespace, "web")
	if s.web, err = s.authority.Leaf(web); err != nil {
		t.Fatal(err)
	}
	s.pair, err = rig.NewPair(t.Context(), rig.Config{
		Proxy: meshProxy, Dir: dir, Authority: s.authority, Source: web, Args: []string{"--log-level", "debug"},
		Apps: []rig.App{{Name: name, Address: start(t, filepath.Join(dir, "app"), s.recorder), Intentions: rules()}},
		Log: func(proxy, line string) {
			if proxy == "callee" {
				s.allowed.line(line)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.pair.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// door is a way to the application.
type door string

const (
	upstream door = "upstream" // the caller's plain listener: through both proxies
	mesh     door = "mesh"     // the callee's mesh port: as a hostile proxy with a valid identity
)

func (s *stand) dial(d door) (net.Conn, error) {
	if d == upstream {
		return net.DialTimeout("tcp", s.pair.Upstreams[s.app], patience)
	}
	cfg := ca.ClientConfig(ca.ClientOptions{
		Leaf:       func() (*tls.Certificate, error) { return s.web.TLS(), nil },
		Bundle:     func() ca.Bundle { return s.authority.Bundle },
		Accept:     ca.Expect(spiffe.Service(trustDomain, catalog.DefaultNamespace, s.app)),
		ServerName: rig.ServerName(s.app), ALPN: []string{"http/1.1"},
	})
	return tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", s.pair.Mesh, cfg)
}

// response is one final response.
type response struct {
	status int
	// seen is what the application said to have seen; own is the proxy's own
	// error, empty for the application's responses.
	seen, own string
	closes    bool
}

// send sends bytes on one connection and returns the responses to it until the
// connection ended, and how it ended.
func (s *stand) send(d door, raw string, half bool) ([]response, error) {
	nc, err := s.dial(d)
	if err != nil {
		return nil, err
	}
	defer nc.Close() //nolint:errcheck // it is read to its end
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		// What could not be sent shows in what comes back.
		_, err := io.WriteString(nc, raw)
		if closer, ok := nc.(interface{ CloseWrite() error }); err == nil && half && ok {
			_ = closer.CloseWrite()
		}
	}()
	responses, err := readResponses(bufio.NewReader(nc))
	if errors.Is(err, io.EOF) {
		err = nil
	}
	_ = nc.Close() // ends a write that nobody reads any more
	<-written
	return responses, err
}

func readResponses(r *bufio.Reader) ([]response, error) {
	var out []response
	for {
		resp, err := readResponse(r)
		if err != nil {
			return out, err
		}
		if resp.status >= 200 || resp.status == 101 {
			out = append(out, resp)
		}
	}
}

// readResponse is strict: what the proxies send is under test too.
func readResponse(r *bufio.Reader) (response, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		if line != "" {
			return response{}, fmt.Errorf("cut in a status line: %q: %w", line, io.ErrUnexpectedEOF)
		}
		return response{}, err
	}
	var resp response
	if len(line) < 13 || line[:9] != "HTTP/1.1 " || !strings.HasSuffix(line, "\r\n") {
		return response{}, fmt.Errorf("no status line: %q", line)
	}
	if resp.status, err = strconv.Atoi(line[9:12]); err != nil {
		return response{}, fmt.Errorf("no status line: %q", line)
	}
	length, isChunked := int64(-1), false
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return response{}, fmt.Errorf("cut in a head: %w", io.ErrUnexpectedEOF)
		}
		if line == "\r\n" {
			break
		}
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\r\n"), ":")
		if !ok {
			return response{}, fmt.Errorf("no field line: %q", line)
		}
		value = strings.TrimSpace(value)
		switch strings.ToLower(name) {
		case "content-length":
			if length, err = strconv.ParseInt(value, 10, 64); err != nil {
				return response{}, fmt.Errorf("no length: %q", line)
			}
		case "transfer-encoding":
			isChunked = true
		case "x-seen":
			resp.seen = value
		case "mesh-error":
			resp.own = value
		case "connection":
			resp.closes = strings.EqualFold(value, "close")
		}
	}
	switch {
	case resp.status < 200 || strings.HasPrefix(resp.seen, "HEAD "):
		return resp, nil
	case isChunked:
		return resp, skipChunks(r)
	case length < 0:
		return resp, errors.New("a response of unknown length")
	}
	if _, err := io.CopyN(io.Discard, r, length); err != nil {
		return response{}, fmt.Errorf("cut in a body: %w", io.ErrUnexpectedEOF)
	}
	return resp, nil
}

func skipChunks(r *bufio.Reader) error {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("cut in a body: %w", io.ErrUnexpectedEOF)
		}
		size, err := strconv.ParseInt(strings.TrimSuffix(line, "\r\n"), 16, 64)
		if err != nil {
			return fmt.Errorf("no chunk size: %q", line)
		}
		if _, err := io.CopyN(io.Discard, r, size+2); err != nil {
			return fmt.Errorf("cut in a body: %w", io.ErrUnexpectedEOF)
		}
		if size == 0 {
			return nil
		}
	}
}

// outcome is what came of one vector.
type outcome struct {
	responses []response
	err       error // how the connection ended, nil for an orderly end
	sights    []sight
	allowed   int
}

// try sends one vector and the canary, then a request of its own on another
// connection: were a byte of the vector left on a connection to the
// application, that request would meet it. It holds what is true of every
// vector, and returns what the caller compares.
func (s *stand) try(t *testing.T, d door, raw string, half bool) outcome {
	t.Helper()
	var o outcome
	o.responses, o.err = s.send(d, raw+canary, half)
	after := s.fence(t, d)
	o.sights, o.allowed = after.sights, after.allowed
	for _, problem := range s.problems(o, half) {
		t.Error(problem)
	}
	return o
}

// fence sends a request of its own on another connection, and returns what the
// application saw, and the proxy allowed, before it.
func (s *stand) fence(t *testing.T, d door) outcome {
	t.Helper()
	var o outcome
	var ok bool
	s.fences++
	target := fmt.Sprintf("/fence/%d", s.fences)
	fence, err := s.send(d, "GET "+target+" HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n", false)
	if err != nil || len(fence) != 1 || fence[0].seen != "GET "+target {
		t.Errorf("the next request on a connection of its own got %+v, %v", fence, err)
	}
	isFence := func(s sight) bool { return s.Line == "GET "+target }
	if !s.recorder.wait(patience, func(all []sight) bool { return slices.ContainsFunc(all, isFence) }) {
		t.Fatalf("the application did not see %s: %+v", target, s.recorder.take())
	}
	if o.allowed, ok = s.allowed.take(s.fences); !ok {
		t.Fatalf("the proxy's log does not tell that it allowed %s", target)
	}
	// The head of a request whose body broke may still be on its way, or have
	// been dropped.
	s.recorder.wait(straggle, func(all []sight) bool { return len(all) >= o.allowed+1 })
	o.sights = slices.DeleteFunc(s.recorder.take(), isFence)
	return o
}

// problems lists which of the rules that no input may break were broken.
func (s *stand) problems(o outcome, half bool) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, seen := range o.sights {
		method, target, _ := strings.Cut(seen.Line, " ")
		path, _, _ := strings.Cut(target, "?")
		if err := permitted(method, path); err != nil {
			add("the application saw a request that policy does not allow: %v", err)
		}
		if seen.Path != "" && seen.Path != path && permittedDecoded(method, seen.Path) != nil {
			add("the application read %q as %q, which policy does not allow", path, seen.Path)
		}
		if seen.Identity != s.identity() {
			add("the application saw the identity %q, want %q", seen.Identity, s.identity())
		}
		if seen.Forged != "" {
			add("a field that only the mesh may set arrived: %q", seen.Forged)
		}
	}
	// A request that was allowed may be cut before it leaves, if its client
	// went; none is seen that was not allowed.
	if len(o.sights) > o.allowed || !half && len(o.sights) != o.allowed {
		add("the application saw %d requests, the proxy allowed %d: %+v", len(o.sights), o.allowed, o.sights)
	}
	n := 0
	for i, r := range o.responses {
		for half && r.own == "" && n < len(o.sights) && o.sights[n].Line != r.seen {
			n++ // its response was not waited for
		}
		switch {
		case r.own != "":
		case n >= len(o.sights) || o.sights[n].Line != r.seen:
			add("response %d is to %q, and the application saw %+v", i, r.seen, o.sights)
		default:
			n++
		}
		if i == len(o.responses)-1 {
			continue
		}
		if r.closes || r.own == "bad-request" {
			add("response %d ends the connection, and another followed: %+v", i, o.responses)
		}
	}
	if !half && n != len(o.sights) {
		add("the application answered %d requests, the client got %d of the responses", len(o.sights), n)
	}
	return out
}

// identity is what the application must be told about the caller.
func (s *stand) identity() string {
	return "By=spiffe://" + trustDomain + "/ns/default/svc/" + s.app + ";URI=spiffe://" + trustDomain + "/ns/default/svc/web"
}

// permittedDecoded is permitted for a path that an application has decoded: a
// percent sign, a question mark and the like were encoded before.
func permittedDecoded(method, path string) error {
	return permitted(method, strings.ReplaceAll(path, "%", ""))
}
