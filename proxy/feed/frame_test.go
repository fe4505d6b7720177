package feed_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/proxy/flow"
)

func frames() map[string]feed.Frame {
	data := []byte(`{"name":"x"}`)
	return map[string]feed.Frame{
		"hello":   {Hello: &feed.Hello{Proxy: "vm-a", Session: "s", PID: 1, State: feed.Active, Parts: map[string]string{"plan/": "h"}}},
		"applied": {Applied: &feed.Applied{Seq: 3, Position: catalog.Position{Generation: "g", Revision: 2}, Refused: "why", Closed: 4}},
		"bye":     {Bye: &feed.Bye{}},
		"plan": {Plan: &feed.Plan{
			Seq: 3, More: true, Drop: []string{"cluster/y"},
			Put: []proxy.Part{{Kind: proxy.PartCluster, Name: "x", Hash: proxy.HashPart(proxy.PartCluster, "x", data), JSON: data}},
		}},
		"keys": {Keys: &feed.Keys{
			Put:  []feed.Key{{ID: spiffe.Service(trustDomain, "default", "web"), Chain: [][]byte{{1}}, Key: []byte{2}}},
			Drop: []spiffe.ID{spiffe.Service(trustDomain, "default", "db")},
		}},
		"state":   {State: &feed.SetTo{To: feed.Draining}},
		"sockets": {Sockets: &feed.Sockets{Names: []string{"mesh"}, Close: []string{"x"}}},
		"query":   {Query: &feed.Query{ID: 4, Query: flow.Query{Want: flow.Denials, Source: "web", Limit: 3}}},
		"answer": {Answer: &feed.Answer{ID: 4, Answer: flow.Answer{
			Records: []flow.Record{{
				Time: time.Unix(1, 0).UTC(), Kind: flow.HTTP, Verdict: flow.Denied, Source: spiffe.Service(trustDomain, "default", "web"), ErrorID: "7f3a91",
			}},
			Sample: &flow.Sample{Session: "s", Edges: []flow.Edge{{Direction: flow.Inbound, Requests: [flow.Classes]uint64{2: 7}}}}, Done: true,
		}}},
	}
}

func TestFramesSurvive(t *testing.T) {
	for name, want := range frames() {
		t.Run(name, func(t *testing.T) {
			wire, err := feed.AppendFrame(nil, want)
			if err != nil {
				t.Fatal(err)
			}
			got, err := feed.ReadFrame(bytes.NewReader(wire))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestReadFrameRefuses(t *testing.T) {
	wire := func(length uint32, body string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, length), body...)
	}
	tests := map[string]struct {
		wire []byte
		want error
	}{
		"the end":       {nil, io.EOF},
		"half a length": {[]byte{0, 0}, io.ErrUnexpectedEOF},
		"half a frame":  {wire(10, "{}"), io.ErrUnexpectedEOF},
		"too long":      {wire(feed.MaxFrame+1, "{}"), feed.ErrFrame},
		"no JSON":       {wire(2, "}{"), feed.ErrFrame},
		"no kind":       {wire(2, "{}"), feed.ErrFrame},
		"unknown kind":  {wire(11, `{"tap":{}} `), feed.ErrFrame},
		"two kinds":     {wire(21, `{"bye":{},"plan":{}} `), feed.ErrFrame},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := feed.ReadFrame(bytes.NewReader(tt.wire)); !errors.Is(err, tt.want) {
				t.Errorf("ReadFrame = %v, want %v", err, tt.want)
			}
		})
	}
}

// What a peer sends out of place ends its session, and nobody else's.
func TestServerRefusesSessions(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	must(t, a.SetPlan("vm-a", s.plan(1, 1)))
	_, h, _ := startProxy(t, a.path, "")
	h.wait(t, "the plan", at(1))
	hello, err := feed.AppendFrame(nil, feed.Frame{Hello: &feed.Hello{Proxy: "vm-x", Session: "s", State: feed.Active}})
	must(t, err)
	with := func(f feed.Frame) []byte {
		wire, err := feed.AppendFrame(bytes.Clone(hello), f)
		must(t, err)
		return wire
	}
	tests := map[string][]byte{
		"garbage":                  []byte("GET / HTTP/1.1\r\n\r\n"),
		"no hello":                 with(feed.Frame{Bye: &feed.Bye{}})[len(hello):],
		"a plan from a proxy":      with(frames()["plan"]),
		"keys from a proxy":        with(frames()["keys"]),
		"sockets without sockets":  with(frames()["sockets"]),
		"a second hello":           with(frames()["hello"]),
		"a frame that is too long": append(bytes.Clone(hello), 0xff, 0xff, 0xff, 0xff),
		"an answer that nobody asked, then the end": append(with(frames()["applied"]), with(feed.Frame{Bye: &feed.Bye{}})[len(hello):]...),
	}
	for name, wire := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("unix", a.path)
			must(t, err)
			defer func() { _ = c.Close() }()
			must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
			_, err = c.Write(wire)
			must(t, err)
			if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("the session was not closed: %v", err)
			}
		})
	}
	a.waitStatus(t, "only the good session is left", func(s []feed.ProxyStatus) bool { return len(s) == 1 && s[0].Proxy == "vm-a" })
	must(t, a.SetPlan("vm-a", s.plan(2, 1)))
	h.wait(t, "the good session goes on", at(2))
}

func FuzzReadFrame(f *testing.F) {
	for _, frame := range frames() {
		wire, err := feed.AppendFrame(nil, frame)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		got, err := feed.ReadFrame(bytes.NewReader(wire))
		if err != nil {
			return
		}
		again, err := feed.AppendFrame(nil, got)
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		if _, err := feed.ReadFrame(bytes.NewReader(again)); err != nil {
			t.Fatalf("what was written can't be read: %v", err)
		}
	})
}

// An agent gone mad must not bring a proxy down.
func TestClientSurvivesDamagedFrames(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) // the same damage in every run
	for round := range 20 {
		for name, frame := range frames() {
			wire, err := feed.AppendFrame(nil, frame)
			must(t, err)
			for range round {
				wire[random.IntN(len(wire))] ^= 1 << random.IntN(8)
			}
			l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), name)})
			must(t, err)
			c := feed.NewClient(feed.ClientConfig{Socket: l.Addr().String(), Proxy: "p", Log: slog.New(slog.DiscardHandler)})
			stop := run(t, "proxy", func(ctx context.Context) error { return c.Run(ctx, newHandler()) })
			nc, err := l.AcceptUnix()
			must(t, err)
			_, _ = nc.Write(wire)
			must(t, nc.CloseWrite())
			must(t, nc.SetDeadline(time.Now().Add(10*time.Second)))
			if _, err := io.Copy(io.Discard, nc); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("after %q the session was not closed: %v", wire, err)
			}
			_ = nc.Close()
			stop()
			_ = l.Close()
		}
	}
}
