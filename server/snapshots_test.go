package server_test

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/client"
)

// The server that leads takes a snapshot by itself, encrypted under its own key,
// unless it is told not to.
func TestScheduledSnapshot(t *testing.T) {
	t.Parallel()
	off := false
	quiet := mustRun(t, server.Config{DataDir: privateDir(t), Snapshots: server.Snapshots{Enabled: &off}})
	i := mustRun(t, server.Config{DataDir: privateDir(t)})
	deadline, tick := time.After(20*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	var files []string
	for len(files) == 0 {
		select {
		case <-deadline:
			t.Fatal("no snapshot was taken")
		case <-tick.C:
		}
		var err error
		if files, err = filepath.Glob(filepath.Join(i.dir, "snapshots", "*.snapshot")); err != nil {
			t.Fatal(err)
		}
	}
	file, err := os.Open(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	key, err := ca.ReadClusterKey(filepath.Join(i.dir, "cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	report, err := backup.Inspect(file, key)
	if err != nil || report.Header.TrustDomain != trustDomain || report.Header.Server != "server-1" || len(report.Records) == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if left, err := os.ReadDir(filepath.Join(quiet.dir, "snapshots")); err == nil {
		t.Errorf("snapshots are off, and there are %v", left)
	}
	i.stop() // while the next is due in an hour
	if logs := i.logs.String(); !strings.Contains(logs, "a snapshot was taken") {
		t.Errorf("the log says nothing of it:\n%s", logs)
	}
}

// A cluster is saved and restored through any of its servers, and stays the cluster
// that it is.
func TestSnapshotOfACluster(t *testing.T) {
	t.Parallel()
	c := newTrio(t)
	for i := range c.dirs {
		c.start(t, i)
	}
	for i := range c.dirs {
		c.await(t, i)
	}
	node := func(method string, through int, name, body string) int {
		return call(t, c.running[through].local(), method, "http://x/v1/nodes/"+name, "", body, nil)
	}
	until(t, "a write", func() bool { return node(http.MethodPut, 0, "vm-a", `{"name":"vm-a"}`) == http.StatusOK })
	for through := range c.dirs {
		snapshot := c.running[through].snapshot(t)
		other := (through + 1) % len(c.dirs)
		until(t, "a deletion", func() bool {
			code := node(http.MethodDelete, other, "vm-a", "")
			return code == http.StatusOK || code == http.StatusNotFound
		})
		var done client.Restored
		if code := call(t, c.running[other].local(), http.MethodPut, "http://x/v1/snapshot", "", snapshot, &done); code != http.StatusOK {
			t.Fatalf("saved by server %d, restored by %d: status %d", through+1, other+1, code)
		}
		if !slices.Contains(done.Changes, client.RecordChange{Kind: "node", Added: 1}) {
			t.Errorf("%+v", done)
		}
		for i := range c.dirs {
			if code := node(http.MethodGet, i, "vm-a", ""); code != http.StatusOK {
				t.Errorf("server %d, after a restore by %d: status %d", i+1, other+1, code)
			}
			var members struct {
				Members []client.Member `json:"members"`
			}
			if code := call(t, c.running[i].local(), http.MethodGet, "http://x/v1/status", "", "", &members); code != http.StatusOK || len(members.Members) != 3 {
				t.Errorf("server %d, after a restore by %d: status %d, %d members", i+1, other+1, code, len(members.Members))
			}
		}
	}
}
