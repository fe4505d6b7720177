package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// ending is how a client vanishes.
type ending struct {
	name string
	// begin sends the text, if it uploads, or asks and reads a part, and returns
	// what makes the client vanish.
	begin func(t *testing.T, h *host, addr, first string, upload bool) (vanish func())
}

// endings are the ways in which a client can vanish. reset is what TCP needs,
// where the plain end of a stream in the middle can't be told from its end.
func endings(reset bool) []ending {
	all := []ending{
		{"reset", func(t *testing.T, h *host, addr, first string, upload bool) func() {
			t.Helper()
			c := beginRaw(t, h, addr, first, upload)
			return func() {
				if tc, ok := c.(*net.TCPConn); ok {
					_ = tc.SetLinger(0)
				}
				_ = c.Close()
			}
		}},
		{"its process is killed", func(t *testing.T, h *host, addr, first string, upload bool) func() {
			t.Helper()
			p := h.Start("vanishing", python, "-u", "-c", vanishing, addr[strings.LastIndexByte(addr, ':')+1:], first, fmt.Sprint(upload))
			eventually(t, 10*time.Second, "the client is in the middle of it", func() string {
				if said := tail(p.Log, 1); said != "half way" {
					return "it says " + said
				}
				return ""
			})
			return func() {
				p.Kill(syscall.SIGKILL)
				_ = syscall.Unlink(p.Log)
			}
		}},
	}
	if !reset {
		all = append(all, ending{"closed", func(t *testing.T, h *host, addr, first string, upload bool) func() {
			t.Helper()
			c := beginRaw(t, h, addr, first, upload)
			return func() { _ = c.Close() }
		}})
	}
	return all
}

// vanishing leaves a byte unread, so that the kernel resets its connection when it
// dies, as it does with those of most programs.
const vanishing = `
import socket, sys, time
c = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
c.sendall(sys.argv[2].encode())
if sys.argv[3] == "true":
    c.sendall(b"x" * 300_000)
c.recv(1)
print("half way")
time.sleep(60)
`

func beginRaw(t *testing.T, h *host, addr, first string, upload bool) net.Conn {
	t.Helper()
	c := h.connect(addr)
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if upload {
		first += strings.Repeat("x", 300_000)
	}
	if _, err := io.WriteString(c, first); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestClientVanishes: a client that vanishes in the middle of a body is not taken
// for one that has come to its end: the application's connection is reset.
func TestClientVanishes(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "http", protocol: "http", port: 8601, local: 9601}, offer{name: "tcp", protocol: "tcp", port: 8602, local: 9602})
	apps := map[string]net.Listener{"http": m.far.Listen("127.0.0.1:8601"), "tcp": m.far.Listen("127.0.0.1:8602")}
	for _, c := range []struct {
		protocol, addr, first string
		upload                bool
	}{
		{"http", "127.0.0.1:9601", "POST /up HTTP/1.1\r\nHost: app\r\nContent-Length: 10000000\r\n\r\n", true},
		{"http", "127.0.0.1:9601", "POST /up HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n", true},
		{"http", "127.0.0.1:9601", "GET /down HTTP/1.1\r\nHost: app\r\n\r\n", false},
		{"tcp", "127.0.0.1:9602", "up\n", true},
		{"tcp", "127.0.0.1:9602", "down\n", false},
	} {
		way := map[bool]string{true: "upload", false: "download"}[c.upload]
		for _, e := range endings(c.protocol == "tcp" && c.upload) {
			saw := make(chan string, 1)
			go func() { saw <- sees(apps[c.protocol], c.protocol, c.upload) }()
			vanish := e.begin(t, m.web.host, c.addr, c.first, c.upload)
			begun := time.Now()
			vanish()
			select {
			case got := <-saw:
				if got != "reset" {
					t.Errorf("%s %s, %s: the application sees %s", c.protocol, way, e.name, got)
				}
				if took := time.Since(begun); took > 2*time.Second {
					t.Errorf("%s %s, %s: seen after %s", c.protocol, way, e.name, took)
				}
			case <-time.After(15 * time.Second):
				t.Errorf("%s %s, %s: after 15 s the application has not seen it", c.protocol, way, e.name)
			}
		}
	}
}

// sees is an application that takes one connection, answers with some bytes, then
// reads or writes without end, and tells how that ended.
func sees(l net.Listener, protocol string, upload bool) string {
	c, err := l.Accept()
	if err != nil {
		return err.Error()
	}
	defer c.Close() //nolint:errcheck // it has ended
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err.Error()
	}
	r := bufio.NewReader(c)
	if _, err := r.ReadString('\n'); err != nil {
		return "no first line: " + err.Error()
	}
	answer := "some bytes of an answer"
	if protocol == "http" {
		answer = "HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + answer
	}
	if _, err := io.WriteString(c, answer); err != nil {
		return "no answer: " + err.Error()
	}
	if upload {
		_, err = io.Copy(io.Discard, r)
	} else {
		_, err = io.Copy(c, newPattern(99_000_000))
	}
	switch {
	case errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE):
		return "reset"
	case err == nil:
		return "a clean end"
	default:
		return err.Error()
	}
}

// TestServerVanishes: a cut response does not look whole to the client.
func TestServerVanishes(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "http", protocol: "http", port: 8601, local: 9601}, offer{name: "tcp", protocol: "tcp", port: 8602, local: 9602})
	for _, c := range []struct {
		name, addr, app, first, answer string
		reset                          bool
	}{
		{"a response of known length", "127.0.0.1:9601", "127.0.0.1:8601", "GET / HTTP/1.1\r\nHost: app\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf", false},
		{"a chunked response", "127.0.0.1:9601", "127.0.0.1:8601", "GET / HTTP/1.1\r\nHost: app\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", false},
		{"a session", "127.0.0.1:9602", "127.0.0.1:8602", "hello\n", "half", true},
	} {
		l := m.far.Listen(c.app)
		client := m.web.connect(c.addr)
		if err := client.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(client, c.first); err != nil {
			t.Fatal(err)
		}
		app, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(app).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(app, c.answer); err != nil {
			t.Fatal(err)
		}
		got := ""
		for buffer := make([]byte, 512); !strings.Contains(got, "half"); {
			n, err := client.Read(buffer)
			got += string(buffer[:n])
			if err != nil {
				t.Fatalf("%s: %q, %v", c.name, got, err)
			}
		}
		if c.reset {
			_ = app.(*net.TCPConn).SetLinger(0) //nolint:errcheck,forcetypeassert // a TCP connection by its making
		}
		_ = app.Close()
		if rest, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the client reads %q, %v; want a reset", c.name, rest, err)
		}
		_ = l.Close()
	}
}

// TestLinkIsCut: when nothing passes between the hosts any more, both ends of what
// was open and silent learn of it within half a minute. (An end that sends learns
// of it when its kernel gives up repeating, or the idle timeout ends the session.)
func TestLinkIsCut(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "tcp", protocol: "tcp", port: 8602, local: 9602})
	client, app := m.session()
	m.cutLink()
	cut := time.Now()
	var reading sync.WaitGroup
	for name, c := range map[string]net.Conn{"client": client, "application": app} {
		if err := c.SetDeadline(cut.Add(40 * time.Second)); err != nil {
			t.Fatal(err)
		}
		reading.Go(func() {
			_, err := c.Read(make([]byte, 1))
			took := time.Since(cut)
			if !errors.Is(err, syscall.ECONNRESET) || took > 32*time.Second {
				t.Errorf("the %s, after %s: %v; want a reset within half a minute", name, took.Round(time.Second), err)
			}
			t.Logf("the %s's connection is reset after %s", name, took.Round(time.Second))
		})
	}
	reading.Wait()
}

// session opens a TCP session to the service "tcp" and has a line pass through it.
func (m *real) session() (client, app net.Conn) {
	m.t.Helper()
	l := m.far.Listen("127.0.0.1:8602")
	client = m.web.connect("127.0.0.1:9602")
	if _, err := io.WriteString(client, "hello\n"); err != nil {
		m.t.Fatal(err)
	}
	app, err := l.Accept()
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = app.Close() })
	if _, err := bufio.NewReader(app).ReadString('\n'); err != nil {
		m.t.Fatal(err)
	}
	return client, app
}

// cutLink drops every packet between the hosts from now on.
func (m *real) cutLink() {
	m.t.Helper()
	for _, rule := range [][]string{
		{"add", "table", "inet", "cut"},
		{"add", "chain", "inet", "cut", "in", "{ type filter hook input priority 0; }"},
		{"add", "chain", "inet", "cut", "out", "{ type filter hook output priority 0; }"},
		{"add", "rule", "inet", "cut", "in", "iifname", "eth0", "ip", "saddr", m.web.Address, "drop"},
		{"add", "rule", "inet", "cut", "out", "oifname", "eth0", "ip", "daddr", m.web.Address, "drop"},
	} {
		if r := m.far.Run("nft", rule...); r.Code != 0 {
			m.t.Fatalf("nft %v: %s", rule, r.Stderr)
		}
	}
}

// TestLinkIsCutWhileSending has a session on which bytes are on their way when the link goes: keep-alive does not look at those.
func TestLinkIsCutWhileSending(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "tcp", protocol: "tcp", port: 8602, local: 9602})
	client, _ := m.session()
	m.cutLink()
	cut := time.Now()
	if err := client.SetDeadline(cut.Add(50 * time.Second)); err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() {
		_, err := client.Read(make([]byte, 1))
		gone <- err
	}()
	every := time.NewTicker(200 * time.Millisecond)
	defer every.Stop()
	for {
		select {
		case <-every.C:
			_, _ = io.WriteString(client, "more\n") // the read tells how it ends
		case err := <-gone:
			took := time.Since(cut).Round(time.Second)
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("after %s: %v; want a reset", took, err)
			}
			t.Logf("the sender's connection is reset after %s", took)
			return
		}
	}
}
