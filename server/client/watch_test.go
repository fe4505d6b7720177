package client_test

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/client"
)

func read(stream string) (events []string, alive int, last error) {
	for e, err := range client.ReadEvents(strings.NewReader(stream), func() { alive++ }) {
		if last = err; err == nil {
			events = append(events, strings.TrimSpace(e.Type+" "+e.Item.Name))
		}
	}
	return events, alive, last
}

func TestReadEvents(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, stream string
		events       []string
		err          string
	}{
		{"a state and a change", "event: reset\ndata: {\"position\":{}}\n\n: alive\n\nevent:put\ndata:{\"name\":\"a\"}\n\n", []string{"reset", "put a"}, "unexpected EOF"},
		{"of a newer server", "event: shiny\ndata: {}\n\nevent: delete\ndata: {\"name\":\"a\"}\nid: 7\n\n", []string{"delete a"}, "unexpected EOF"},
		{"cut in an event", "event: put\ndata: {\"name\":\"a\"}\n", nil, "unexpected EOF"},
		{"no JSON", "event: put\ndata: {\n\n", nil, "malformed event"},
		{"refused", "event: error\ndata: {\"code\":\"permission\",\"message\":\"no\"}\n\nevent: put\ndata: {}\n\n", nil, "no"},
		{"an endless line", "data: " + strings.Repeat("x", 5<<20), nil, "token too long"},
	} {
		events, alive, err := read(c.stream)
		if d := cmp.Diff(c.events, events); d != "" || err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, %s", c.name, err, d)
		}
		if alive == 0 && c.err != "token too long" {
			t.Errorf("%s: no sign of life", c.name)
		}
	}
}

func FuzzReadEvents(f *testing.F) {
	f.Add("event: reset\ndata: {\"position\":{\"revision\":1}}\n\n")
	f.Add("event: put\ndata: {\"kind\":\"node\",\"ref\":{\"parts\":[\"a\"]}}\n\n: x\n\n")
	f.Add("event: error\ndata: {\"code\":\"internal\"}\n\n")
	f.Fuzz(func(t *testing.T, stream string) {
		events, _, err := read(stream)
		if err == nil {
			t.Fatalf("%d events and no end", len(events))
		}
		if errors.Is(err, io.EOF) {
			t.Fatalf("an end that looks meant: %v", err)
		}
	})
}
