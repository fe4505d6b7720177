package api_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// client returns a client of the admin socket.
func (w *world) client(t *testing.T) *client.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: listener, Config: &http.Server{Handler: w.api.Handler(true), ReadHeaderTimeout: time.Second}}
	s.Start()
	t.Cleanup(s.Close)
	c, err := client.New(client.Config{Address: "unix://" + path})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (w *world) nodes(t *testing.T, names ...string) {
	t.Helper()
	for chunk := range slices.Chunk(names, 30) {
		w.update(t, func(tx *state.Tx) error {
			for _, n := range chunk {
				if err := state.Nodes.Put(tx, n, catalog.Node{Name: n, Labels: map[string]string{"first": n[:1]}}); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func names(items []client.Item) []string {
	var out []string
	for _, i := range items {
		out = append(out, i.Name)
	}
	return out
}

func TestListsComeInPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.nodes(t, "a", "b", "c", "d", "e")
	var page client.List
	w.do(t, http.MethodGet, "/v1/nodes?limit=2", "", http.StatusOK, &page)
	if got := names(page.Items); !slices.Equal(got, []string{"a", "b"}) || page.Continue == "" {
		t.Fatalf("first page: %v, continue %q", got, page.Continue)
	}
	// What the token names may be gone by then.
	w.do(t, http.MethodDelete, "/v1/nodes/b", "", http.StatusOK, nil)
	w.do(t, http.MethodDelete, "/v1/nodes/c", "", http.StatusOK, nil)
	w.nodes(t, "bb")
	next := page.Continue
	page = client.List{}
	w.do(t, http.MethodGet, "/v1/nodes?limit=3&continue="+next, "", http.StatusOK, &page)
	if got := names(page.Items); !slices.Equal(got, []string{"bb", "d", "e"}) || page.Continue != "" {
		t.Errorf("last page: %v, continue %q", got, page.Continue)
	}
	for _, c := range []struct{ path, says string }{
		{"/v1/nodes?limit=0", "from 1 to 1000"},
		{"/v1/nodes?limit=1001", "from 1 to 1000"},
		{"/v1/nodes?limit=x", "from 1 to 1000"},
		{"/v1/nodes?continue=%2f", "not what the page before said"},
		{"/v1/nodes?continue=WyJhIiwiYiJd", "not what the page before said"},
		{"/v1/nodes?namespace=batch", "in no namespace"},
		{"/v1/services?label=a", "have no labels"},
		{"/v1/nodes?label==x", "NAME=VALUE"},
		{"/v1/nodes?lable=x", "did you mean label?"},
		{"/v1/nodes?watch=true&limit=3", "no pages"},
	} {
		status, body := call(t, http.MethodGet, w.url+c.path, w.token, "")
		if status != http.StatusBadRequest || !strings.Contains(body, c.says) {
			t.Errorf("%s: %d %s, want 400 and %q", c.path, status, body, c.says)
		}
	}
}

func TestClientFollowsPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var want []string
	for n := range 1100 {
		want = append(want, fmt.Sprintf("n%04d", n))
	}
	w.nodes(t, want...)
	list, err := w.client(t).List(t.Context(), client.KindNode, client.Selection{})
	if err != nil {
		t.Fatal(err)
	}
	if got := names(list.Items); !slices.Equal(got, want) || list.Position.Revision == 0 {
		t.Errorf("%d nodes at %v, want %d in order", len(got), list.Position, len(want))
	}
}

func TestSelections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.nodes(t, "a1", "a2", "b1")
	w.do(t, http.MethodPut, "/v1/namespaces/batch", `{"name":"batch"}`, http.StatusOK, nil)
	for _, s := range []string{"api", "app"} {
		w.do(t, http.MethodPut, "/v1/services/default/"+s, `{"name":"`+s+`"}`, http.StatusOK, nil)
	}
	w.do(t, http.MethodPut, "/v1/services/batch/api", `{"namespace":"batch","name":"api"}`, http.StatusOK, nil)
	for _, source := range []string{"default/web", "batch/api"} {
		ns, name, _ := strings.Cut(source, "/")
		w.do(t, http.MethodPut, "/v1/intentions/batch/api/"+ns+"/"+name, `{"source":"`+source+`","destination":"batch/api","action":"allow"}`, http.StatusOK, nil)
	}
	c := w.client(t)
	for _, one := range []struct {
		kind client.Kind
		sel  client.Selection
		want []string
	}{
		{client.KindNode, client.Selection{Prefix: "a"}, []string{"a1", "a2"}},
		{client.KindNode, client.Selection{Labels: []string{"first=b"}}, []string{"b1"}},
		{client.KindNode, client.Selection{Labels: []string{"first", "first=a"}, Prefix: "a2"}, []string{"a2"}},
		{client.KindNode, client.Selection{Labels: []string{"second"}}, nil},
		{client.KindService, client.Selection{Namespace: "batch"}, []string{"batch/api"}},
		{client.KindService, client.Selection{Prefix: "api"}, []string{"batch/api", "api"}},
		{client.KindService, client.Selection{Namespace: "default", Prefix: "ap"}, []string{"api", "app"}},
		{client.KindIntention, client.Selection{Namespace: "batch"}, []string{"batch/api → batch/api", "web → batch/api"}},
		{client.KindIntention, client.Selection{Namespace: "default"}, nil},
	} {
		list, err := c.List(t.Context(), one.kind, one.sel)
		if got := names(list.Items); err != nil || !slices.Equal(got, one.want) {
			t.Errorf("%ss %+v: %q, %v, want %q", one.kind, one.sel, got, err, one.want)
		}
	}
}

// watching collects the events of a watch as short lines.
type watching struct {
	t     *testing.T
	lines chan string
}

func (w *world) watch(t *testing.T, kind client.Kind, sel client.Selection) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := &watching{t: t, lines: make(chan string, 100)}
	c, done := w.client(t), make(chan struct{})
	go func() {
		defer close(done)
		for e, err := range c.Watch(ctx, kind, sel) {
			line := strings.TrimSpace(e.Type + " " + e.Item.Name + " " + string(e.Item.Status))
			if err != nil {
				line = "error " + string(client.CodeOf(err))
			}
			out.lines <- line
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

// want demands that the next events begin with the given lines.
func (w *watching) want(lines ...string) {
	w.t.Helper()
	for _, want := range lines {
		select {
		case got := <-w.lines:
			if !strings.HasPrefix(got, want) {
				w.t.Fatalf("event %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			w.t.Fatalf("no event, want %q", want)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.nodes(t, "a1", "b1")
	all := w.watch(t, client.KindNode, client.Selection{})
	some := w.watch(t, client.KindNode, client.Selection{Labels: []string{"first=a"}})
	services := w.watch(t, client.KindService, client.Selection{})
	instances := w.watch(t, client.KindInstance, client.Selection{})
	all.want("reset", "put a1", "put b1", "position")
	some.want("reset", "put a1", "position")
	services.want("reset", "position")
	instances.want("reset", "position")

	w.nodes(t, "a2")
	all.want("put a2", "position")
	some.want("put a2", "position")
	// What is no longer selected is gone; what never was is not told of.
	w.do(t, http.MethodPut, "/v1/nodes/a1", `{"name":"a1","labels":{"first":"x"}}`, http.StatusOK, nil)
	all.want("put a1", "position")
	some.want("delete a1", "position")
	w.do(t, http.MethodDelete, "/v1/nodes/b1", "", http.StatusOK, nil)
	all.want("delete b1", "position")

	// Status moves with other records.
	name := catalog.Name{Namespace: "default", Name: "api"}
	key := catalog.InstanceKey{Service: name, Node: "a2", ID: "api"}
	w.update(t, func(tx *state.Tx) error {
		if err := state.Services.Put(tx, name, catalog.Service{Name: "api"}); err != nil {
			return err
		}
		return state.Instances.Put(tx, key, catalog.Instance{Service: "api", ID: "api", Node: "a2"})
	})
	some.want("put a2 {", "position")
	services.want(`put api {"instances":1,"healthy":0`, "position")
	instances.want(`put api/a2/api {"health":"unknown"`, "position")
	w.update(t, func(tx *state.Tx) error {
		if err := state.InstanceStatuses.Put(tx, key, catalog.InstanceStatus{Health: catalog.HealthPassing}); err != nil {
			return err
		}
		return state.Leases.Put(tx, "a2", catalog.Lease{Server: "s1"})
	})
	some.want("put a2", "position")
	services.want(`put api {"instances":1,"healthy":1`, "position")
	instances.want(`put api/a2/api {"health":"passing"`, "position")
	w.update(t, func(tx *state.Tx) error { return state.Leases.Put(tx, "a2", catalog.Lease{Server: "s1", Lost: true}) })
	some.want("put a2", "position")
	services.want(`put api {"instances":1,"healthy":0,"stale":1`, "position")
	instances.want("put api/a2/api", "position")

	// A restored state is another one, with positions of its own.
	status, snapshot := call(t, http.MethodGet, w.url+"/v1/snapshot", w.token, "")
	if status != http.StatusOK {
		t.Fatal(snapshot)
	}
	w.do(t, http.MethodPut, "/v1/snapshot", snapshot, http.StatusOK, nil)
	some.want("reset", "put a2", "position")

	w.api.EndWatches()
	some.want("error unreachable")
}

// TestWatchEndsWithTheToken: a token that is taken away takes the watches
// made with it along.
func TestWatchEndsWithTheToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	record, secret := acl.NewToken(acl.PolicyAdmin, "leaves", time.Now())
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/v1/nodes?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("content type %q", got)
	}
	w.update(t, func(tx *state.Tx) error {
		state.Tokens.Delete(tx, acl.Hash([]byte(secret)))
		return state.Nodes.Put(tx, "late", catalog.Node{Name: "late"})
	})
	body, err := io.ReadAll(resp.Body)
	if err != nil || !strings.HasPrefix(string(body), "event: reset\ndata: {\"position\":{") {
		t.Errorf("%q, %v", body, err)
	}
	if !strings.Contains(string(body), "event: error\ndata: {\"code\":\"unauthorized\"") || strings.Contains(string(body), "late") {
		t.Errorf("after the token was deleted: %q", body)
	}
}

func TestWatchSaysThatItLives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.local+"/v1/nodes?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // cut below
	seen, buf := "", make([]byte, 512)
	for strings.Count(seen, ": alive\n\n") < 2 {
		n, err := resp.Body.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, seen)
		}
		seen += string(buf[:n])
	}
}
