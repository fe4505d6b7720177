package server_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/backup"
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
