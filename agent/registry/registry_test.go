package registry_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/catalog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// folder is one services.d with its state directory.
type folder struct {
	t     *testing.T
	path  string
	state statedir.Dir
}

func newFolder(t *testing.T) *folder {
	t.Helper()
	f := &folder{t: t, path: filepath.Join(t.TempDir(), "services.d")}
	if err := os.Mkdir(f.path, 0o750); err != nil {
		t.Fatal(err)
	}
	var err error
	if f.state, err = statedir.Open(filepath.Join(t.TempDir(), "agent")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *folder) write(name, content string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.path, name), []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *folder) remove(name string) {
	f.t.Helper()
	if err := os.Remove(filepath.Join(f.path, name)); err != nil {
		f.t.Fatal(err)
	}
}

// open returns a registry that has read the folder.
func (f *folder) open(poll time.Duration) *registry.Registry {
	f.t.Helper()
	r := registry.New(registry.Config{Log: slog.New(slog.DiscardHandler), Folder: f.path, Dir: f.state, Poll: poll})
	if err := r.Load(); err != nil {
		f.t.Fatal(err)
	}
	return r
}

func (f *folder) run(r *registry.Registry) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	f.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Errorf("Run: %v", err)
		}
	})
}

// state is what a registry shows.
type state struct {
	running  []string
	problems []string
}

func show(r *registry.Registry) state {
	var s state
	for _, d := range r.Definitions() {
		s.running = append(s.running, registry.Key(d))
	}
	files, folder := r.Files()
	for _, file := range files {
		s.problems = append(s.problems, file.Problems...)
	}
	if folder != "" {
		s.problems = append(s.problems, folder)
	}
	return s
}

func until(t *testing.T, r *registry.Registry, fits func(state) bool) state {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		changed := r.Changed()
		s := show(r)
		if fits(s) {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("never so: %+v", s)
		}
	}
}

func runs(keys ...string) func(state) bool {
	return func(s state) bool { return cmp.Equal(keys, s.running) && s.problems == nil }
}

const (
	web   = "service \"web\" {\n  port = 9002\n}\n"
	redis = "service \"redis\" {\n  port = 6379\n}\n"
)

func TestEveryFormatIsRead(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("a.hcl", web)
	f.write("b.yaml", "name: cron\nnamespace: batch\n")
	f.write("c.yml", "name: yml\n")
	f.write("d.json", `{"name": "api", "port": 8080, "id": "api-1"}`)
	f.write("README", "no definition")
	f.write(".hidden.hcl", "service {")
	f.write("e.hcl~", "service {")
	if err := os.Mkdir(filepath.Join(f.path, "dir.hcl"), 0o750); err != nil {
		t.Fatal(err)
	}
	want := state{running: []string{"batch/cron/cron", "default/api/api-1", "default/web/web", "default/yml/yml"}}
	if diff := cmp.Diff(want, show(f.open(0)), cmp.AllowUnexported(state{})); diff != "" {
		t.Error(diff)
	}
}

func TestChangesAreFollowed(t *testing.T) {
	t.Parallel()
	rows := map[string]time.Duration{"by notification": time.Hour, "by polling": 50 * time.Millisecond}
	for name, poll := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFolder(t)
			f.write("web.hcl", web)
			r := f.open(poll)
			f.run(r)
			until(t, r, runs("default/web/web"))
			if poll == time.Hour {
				r.Reload() // the watch is in place when this was read
			}
			f.write("redis.hcl", redis)
			until(t, r, runs("default/redis/redis", "default/web/web"))
			f.remove("web.hcl")
			until(t, r, runs("default/redis/redis"))
			f.write("redis.hcl", strings.Replace(redis, "6379", "6380", 1))
			until(t, r, func(state) bool { d := r.Definitions(); return len(d) == 1 && d[0].Port == 6380 })
		})
	}
}

func TestBadEditLeavesTheLastGoodVersion(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("web.hcl", web)
	f.write("redis.hcl", redis)
	r := f.open(20 * time.Millisecond)
	f.run(r)
	f.write("web.hcl", "service \"web\" {\n  port = 9002\n  protocol = \"htpt\"\n}\n")
	f.write("redis.hcl", strings.Replace(redis, "6379", "6380", 1)) // others are followed
	want := `web.hcl:3: protocol: "htpt" is no protocol (did you mean "http"?): write one of auto, http, http2, grpc, tcp`
	s := until(t, r, func(s state) bool { return s.problems != nil })
	if diff := cmp.Diff(state{running: []string{"default/redis/redis", "default/web/web"}, problems: []string{want}}, s, cmp.AllowUnexported(state{})); diff != "" {
		t.Error(diff)
	}
	for _, d := range r.Definitions() {
		if d.Name == "redis" && d.Port != 6380 {
			t.Error("another file's change was not followed")
		}
	}
	// A restart with the bad file still there.
	again := f.open(0)
	if diff := cmp.Diff(s, show(again), cmp.AllowUnexported(state{})); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
	f.write("web.hcl", web)
	until(t, r, runs("default/redis/redis", "default/web/web"))
}

func TestUnreadableAtFirst(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("bad.hcl", "service \"web\" {\n")
	f.write("good.hcl", redis)
	s := show(f.open(0))
	if len(s.problems) == 0 || !strings.HasPrefix(s.problems[0], "bad.hcl:") || !cmp.Equal([]string{"default/redis/redis"}, s.running) {
		t.Errorf("got %+v", s)
	}
}

func TestOneServiceInTwoFiles(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("b.hcl", redis)
	r := f.open(20 * time.Millisecond)
	f.run(r)
	f.write("a.hcl", redis)
	want := state{
		running:  []string{"default/redis/redis"},
		problems: []string{`a.hcl: id: service redis with id "redis" is defined in b.hcl too: give one of them another id`},
	}
	s := until(t, r, func(s state) bool { return s.problems != nil })
	if diff := cmp.Diff(want, s, cmp.AllowUnexported(state{})); diff != "" {
		t.Errorf("the file that ran first stays: %s", diff)
	}
	f.remove("b.hcl") // the instance moves to the other file
	until(t, r, runs("default/redis/redis"))
	f.write("b.hcl", "service \"redis\" {\n  id = \"redis-2\"\n  port = 6380\n}\n")
	until(t, r, runs("default/redis/redis", "default/redis/redis-2"))
}

func TestFilesInPartsTakeNothingDown(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("both.hcl", web+redis)
	r := f.open(5 * time.Millisecond)
	f.run(r)
	both := runs("default/redis/redis", "default/web/web")
	until(t, r, both)
	// A version that stands for a second is meant. A test that did not get the CPU for so long has seen nothing in this round.
	for range 3 {
		f.write("both.hcl", web+redis)
		until(t, r, both)
		whole := time.Now()
		stays := func(what string) bool {
			select { // long enough to be read, too short to settle
			case <-r.Changed():
			case <-time.After(40 * time.Millisecond):
			}
			s := show(r)
			if both(s) {
				return true
			}
			if took := time.Since(whole); took < time.Second {
				t.Fatalf("with %s, after %s: %+v", what, took, s)
			}
			return false
		}
		for _, part := range []string{"", web, web + "service \"re", web + redis} {
			f.write("both.hcl", part)
			if !stays(fmt.Sprintf("%q in the file", part)) {
				break
			}
		}
		// An editor's dance: the file is away for a moment.
		if err := os.Rename(filepath.Join(f.path, "both.hcl"), filepath.Join(f.path, "both.hcl.bak")); err != nil {
			t.Fatal(err)
		}
		stays("the file away")
	}
}

func TestFolderThatGoesAway(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write("web.hcl", web)
	r := f.open(10 * time.Millisecond)
	f.run(r)
	away := f.path + ".away"
	if err := os.Rename(f.path, away); err != nil {
		t.Fatal(err)
	}
	s := until(t, r, func(s state) bool { return s.problems != nil })
	if !cmp.Equal([]string{"default/web/web"}, s.running) {
		t.Errorf("the services went with the folder: %+v", s)
	}
	again := f.open(0) // a restart meanwhile
	if s := show(again); !cmp.Equal([]string{"default/web/web"}, s.running) {
		t.Errorf("after a restart: %+v", s)
	}
	if err := os.Rename(away, f.path); err != nil {
		t.Fatal(err)
	}
	until(t, r, runs("default/web/web"))
}

func TestRegistrations(t *testing.T) {
	t.Parallel()
	definitions := []catalog.Definition{{Name: "web", ID: "web-2", Port: 9002, Protocol: "http", Weight: 5, Tags: []string{"blue"}}, {Name: "cron", Namespace: "batch"}}
	regs, err := registry.Registrations(definitions, "vm-a", "rack-7", "10.0.0.1:7443",
		func(port, instance, service, namespace string) string {
			return strings.Join([]string{port, instance, service, namespace}, ".")
		},
		func(key string) catalog.InstanceStatus {
			return catalog.InstanceStatus{Health: catalog.HealthWarning, Checks: []catalog.CheckState{{Name: key}}}
		})
	if err != nil {
		t.Fatal(err)
	}
	var service catalog.Service
	var instance catalog.Instance
	var status catalog.InstanceStatus
	for part, into := range map[string]any{string(regs[0].GetService()): &service, string(regs[0].GetInstance()): &instance, string(regs[0].GetStatus()): &status} {
		if err := json.Unmarshal([]byte(part), into); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(catalog.Service{Name: "web", Ports: []catalog.ServicePort{{Name: "default", Protocol: "http"}}}, service); diff != "" {
		t.Error(diff)
	}
	want := catalog.Instance{
		Service: "web", ID: "web-2", Node: "vm-a", MeshAddress: "10.0.0.1:7443", Zone: "rack-7", Weight: 5, Tags: []string{"blue"},
		Ports: []catalog.InstancePort{{Name: "default", Port: 9002, ServerName: "default.web-2.web.default"}},
	}
	if diff := cmp.Diff(want, instance); diff != "" {
		t.Error(diff)
	}
	if status.Checks[0].Name != "default/web/web-2" || status.Health != catalog.HealthWarning {
		t.Errorf("status %+v", status)
	}
	if len(regs) != 2 || strings.Contains(string(regs[1].GetInstance()), "mesh_address") {
		t.Errorf("the pure client: %s", regs[1].GetInstance())
	}
}
