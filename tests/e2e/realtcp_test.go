package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTCPPeers: PostgreSQL, Redis and WebSocket, each with its own clients.
func TestTCPPeers(t *testing.T) { //nolint:tparallel // the peers share two hosts
	t.Parallel()
	m := newReal(t, offer{name: "postgres", protocol: "auto", port: 5432, local: 9501}, offer{name: "redis", protocol: "tcp", port: 6379, local: 9502},
		offer{name: "websocket", protocol: "http", port: 8501, local: 9503}, offer{name: "upgrade", protocol: "http", port: 8502, local: 9504})
	t.Run("PostgreSQL", m.postgres)
	t.Run("Redis", m.redis)
	t.Run("WebSocket", m.websocket)
	t.Run("upgrade", m.upgrade)
}

// postgresBin is where Debian keeps initdb and postgres.
func postgresBin(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		t.Fatalf("no initdb below /usr/lib/postgresql: run `make setup`; %v", err)
	}
	return filepath.Dir(found[len(found)-1])
}

const postgresScript = `\set ON_ERROR_STOP on
create table big(n int, text text);
copy big from program 'seq 1 60000 | sed "s/$/,abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456789/"' with csv;
\copy big to 'out.csv' with csv
create table back(n int, text text);
\copy back from 'out.csv' with csv
select count(*), sum(n), sum(length(text)) from back;
select * from (select * from big except select * from back) as lost;
begin; update back set n = n + 1; rollback;
select sum(n) from back;
listen news;
select pg_sleep(0.1);
notify news, 'extra';
select 'heard above';
`

// postgres queries, copies some megabytes both ways, and waits for a notification
// in one session while another sends it.
func (m *real) postgres(t *testing.T) {
	dir := postgresBin(t)
	data, err := os.MkdirTemp("", "meshd-postgres-") //nolint:usetesting // t.TempDir is for root only
	if err != nil {
		t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = os.RemoveAll(data) })
	if r := m.far.Run("chown", "postgres:postgres", data); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	args := asUser(t, "postgres", dir+"/initdb", "--no-sync", "--auth=trust", "--username=tester", "--locale=C.UTF-8", "-D", data)
	if r := m.far.Run(args[0], args[1:]...); r.Code != 0 {
		t.Fatalf("initdb: %s%s", r.Stdout, r.Stderr)
	}
	args = asUser(t, "postgres", dir+"/postgres", "-D", data, "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off")
	m.far.serve(5432, args[0], args[1:]...)
	psql := []string{"-X", "-q", "-A", "-t", "-h", "127.0.0.1", "-p", "9501", "-U", "tester", "-d", "postgres"}
	eventually(t, 20*time.Second, "PostgreSQL takes queries through the mesh", func() string {
		if r := m.web.Run("psql", append(psql, "-c", "select 1")...); r.Stdout != "1\n" {
			return r.Stdout + r.Stderr
		}
		return ""
	})
	script := m.web.Write(postgresScript, 0o644, "script.sql")
	r := m.web.Run("psql", append(psql, "-f", script)...)
	want := "60000|1800030000|4320000\n1800030000\n\n"
	if r.Code != 0 || !strings.HasPrefix(r.Stdout, want) || !strings.Contains(r.Stdout, `"extra"`) || !strings.Contains(r.Stdout, "heard above") {
		t.Errorf("psql: exit %d\n%s%s\nwant it to begin with %q", r.Code, r.Stdout, r.Stderr, want)
	}
	if info, err := os.Stat(m.web.Path("out.csv")); err != nil || info.Size() < 4<<20 {
		t.Errorf("the copy: %v, %v", info, err)
	}

	// A session that listens while another one speaks.
	listener := m.web.Write("listen news;\n\\echo ready\n"+strings.Repeat("select pg_sleep(0.1);\n", 200), 0o644, "listen.sql")
	p := m.web.Start("psql", "psql", append(psql, "-f", listener)...)
	eventually(t, 10*time.Second, "psql listens", func() string {
		if said := tail(p.Log, 5); !strings.Contains(said, "ready") {
			return "it says: " + said
		}
		return ""
	})
	if r := m.web.Run("psql", append(psql, "-c", "notify news, 'from afar'")...); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	eventually(t, 10*time.Second, "the notification arrives", func() string {
		if said := readFile(t, p.Log); !strings.Contains(said, "from afar") {
			return "it says: " + said
		}
		return ""
	})
}

// redis runs commands, a pipeline of some megabytes, and publishes to a
// subscriber.
func (m *real) redis(t *testing.T) {
	m.far.serve(6379, "redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", m.far.Dir, "--daemonize", "no")
	cli := func(args ...string) string {
		r := m.web.Run("redis-cli", append([]string{"-p", "9502", "--no-raw"}, args...)...)
		if r.Code != 0 {
			t.Errorf("redis-cli %v: exit %d %s", args, r.Code, r.Stderr)
		}
		return r.Stdout
	}
	if got := cli("set", "key", "value"); got != "OK\n" {
		t.Errorf("set: %q", got)
	}
	if got := cli("get", "key"); got != "\"value\"\n" {
		t.Errorf("get: %q", got)
	}

	const n = 20_000
	c := m.web.connect("127.0.0.1:9502")
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		w := bufio.NewWriter(c)
		for i := range n {
			_, _ = fmt.Fprintf(w, "*3\r\n$6\r\nAPPEND\r\n$3\r\nall\r\n$100\r\n%0100d\r\n", i)
		}
		sent <- w.Flush()
	}()
	answers := bufio.NewReader(c)
	for i := range n {
		line, err := answers.ReadString('\n')
		if want := fmt.Sprintf(":%d\r\n", (i+1)*100); err != nil || line != want {
			t.Fatalf("answer %d of the pipeline: %q, %v, want %q", i, line, err, want)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}

	subscriber := m.web.Start("subscriber", "redis-cli", "-p", "9502", "subscribe", "news")
	eventually(t, 10*time.Second, "a message reaches the subscriber", func() string {
		cli("publish", "news", "from afar")
		if said := readFile(t, subscriber.Log); !strings.Contains(said, "from afar") {
			return "it says: " + said
		}
		return ""
	})
}

// webSocketServer echoes messages, and counts those of a connection when asked.
const webSocketServer = `
import asyncio, sys, websockets
async def echo(ws):
    n = 0
    async for message in ws:
        n += 1
        await ws.send(str(n) if message == "count" else message)
        if message == "bye":
            await ws.close(4001, "as you like")
            return
async def main():
    async with websockets.serve(echo, "127.0.0.1", int(sys.argv[1]), max_size=None):
        await asyncio.Future()
asyncio.run(main())
`

const webSocketClient = `
import asyncio, os, websockets
async def one(n, size):
    async with websockets.connect("ws://127.0.0.1:9503/chat?x=1", max_size=None, ping_interval=None) as ws:
        for i in range(n):
            message = os.urandom(size)
            await ws.send(message)
            assert await ws.recv() == message
            await asyncio.wait_for(await ws.ping(os.urandom(8)), 10)
        await ws.send("text ✓")
        assert await ws.recv() == "text ✓"
        await ws.send("count")
        assert await ws.recv() == str(n + 2)
        await ws.send("bye")
        assert await ws.recv() == "bye"
        try:
            await ws.recv()
            assert False, "not closed"
        except websockets.ConnectionClosed as e:
            assert (e.rcvd.code, e.rcvd.reason) == (4001, "as you like"), e
async def main():
    await asyncio.gather(one(10, 1 << 20), *(one(20, 1 + 3000 * k) for k in range(20)))
asyncio.run(main())
print("all good")
`

func (m *real) websocket(t *testing.T) {
	m.far.serve(8501, python, "-u", "-c", webSocketServer, "8501")
	r := m.web.Run(python, "-c", webSocketClient)
	if r.Code != 0 || r.Stdout != "all good\n" {
		t.Errorf("WebSocket: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

const upgradeRequest = "GET /up HTTP/1.1\r\nHost: upgrade\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// upgrade looks at the bytes: nothing of the client's passes before the 101, and
// after it each direction ends on its own.
func (m *real) upgrade(t *testing.T) {
	l := m.far.Listen("127.0.0.1:8502")
	c := m.web.connect("127.0.0.1:9504")
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, upgradeRequest+"EARLY"); err != nil {
		t.Fatal(err)
	}
	app, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close() //nolint:errcheck // ended above
	if err := app.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fromClient := bufio.NewReader(app)
	head := ""
	for !strings.HasSuffix(head, "\r\n\r\n") {
		line, err := fromClient.ReadString('\n')
		if err != nil {
			t.Fatalf("the request: %q, %v", head, err)
		}
		head += line
	}
	if err := app.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := fromClient.Read(make([]byte, 16)); n > 0 || !os.IsTimeout(err) {
		t.Errorf("before the 101 came %d bytes, %v", n, err)
	}
	if _, err := io.WriteString(app, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nhello"); err != nil {
		t.Fatal(err)
	}
	fromApp := bufio.NewReader(c)
	answer := ""
	for !strings.HasSuffix(answer, "hello") {
		b, err := fromApp.ReadByte()
		if err != nil {
			t.Fatalf("the answer: %q, %v", answer, err)
		}
		answer += string(b)
	}
	if !strings.HasPrefix(answer, "HTTP/1.1 101 ") {
		t.Errorf("the answer: %q", answer)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil { //nolint:errcheck,forcetypeassert // a TCP connection by its making
		t.Fatal(err)
	}
	if err := app.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(fromClient); string(rest) != "EARLY" || err != nil {
		t.Errorf("after the 101 the application reads %q, %v", rest, err)
	}
	if _, err := io.WriteString(app, "still open"); err != nil {
		t.Fatal(err)
	}
	_ = app.Close()
	if rest, err := io.ReadAll(fromApp); string(rest) != "still open" || err != nil {
		t.Errorf("after its half-close the client reads %q, %v", rest, err)
	}
}
