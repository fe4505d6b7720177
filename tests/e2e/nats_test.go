package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestNATS: a server that speaks first, behind a port whose protocol nobody tells.
func TestNATS(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "nats", protocol: "auto", port: 4222, local: 9701})
	m.far.serve(4222, "nats-server", "-a", "127.0.0.1", "-p", "4222")
	for i := range 5 {
		begun := time.Now()
		c := m.web.connect("127.0.0.1:9701")
		if err := c.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(c)
		info, err := lines.ReadString('\n')
		t.Logf("connection %d: the greeting came after %s", i, time.Since(begun).Round(100*time.Microsecond))
		if err != nil || !strings.HasPrefix(info, "INFO {") {
			t.Fatalf("the greeting is %q, %v", info, err)
		}
		if _, err := fmt.Fprintf(c, "CONNECT {\"verbose\":false}\r\nSUB news 1\r\nPUB news 5\r\nhello\r\nPING\r\n"); err != nil {
			t.Fatal(err)
		}
		said := ""
		for !strings.Contains(said, "PONG\r\n") {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatal(errors.Join(err, fmt.Errorf("after %q", said)))
			}
			said += line
		}
		if want := "MSG news 1 5\r\nhello\r\nPONG\r\n"; said != want {
			t.Errorf("it says %q, want %q", said, want)
		}
		_ = c.Close()
	}
}
