package main_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
)

// bin is the folder of the meshctl under test.
var bin string //nolint:gochecknoglobals // set once, by TestMain

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "meshctl-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a leftover in the temporary folder
	bin = dir
	if out, err := exec.Command("go", "build", "-o", dir+"/", ".").CombinedOutput(); err != nil {
		fmt.Printf("go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// TestScripts runs testdata/*.txtar, each with a real server of its own: over
// its admin socket in MESH_ADDR, and over the network at $server with the token
// in $WORK/admin.token.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               startServer,
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "follow": follow, "sees": sees, "interrupt": interrupt, "host": host},
	})
}

func startServer(env *testscript.Env) error {
	// The socket's path must be short.
	dir, err := os.MkdirTemp("", "msh")
	if err != nil {
		return err
	}
	tokenFile := filepath.Join(env.WorkDir, "admin.token")
	if err := os.WriteFile(tokenFile, []byte("scripted-admin-token-0123456789abcdef\n"), 0o600); err != nil {
		return err
	}
	socket := filepath.Join(dir, "s")
	log, err := os.Create(filepath.Join(env.WorkDir, "server.log"))
	if err != nil {
		return err
	}
	listener, err := loopback(context.Background())
	if err != nil {
		return err
	}
	s, err := server.New(server.Config{
		TrustDomain: "mesh.example.com", Name: "s1", DataDir: filepath.Join(dir, "data"), AdminSocket: socket,
		BootstrapTokenFile: tokenFile, Listener: listener, Version: "test",
	}, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	env.Defer(func() {
		cancel()
		if err := <-ended; err != nil {
			env.T().Log("server:", err)
		}
		_ = log.Close()
		_ = os.RemoveAll(dir)
	})
	select {
	case <-s.Started():
	case err := <-ended:
		ended <- err
		return fmt.Errorf("the server did not start: %w", err)
	}
	env.Setenv("audit", filepath.Join(dir, "data", "audit"))
	env.Values[followedKey{}] = &followed{}
	env.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	env.Setenv("MESH_ADDR", "unix://"+socket)
	env.Setenv("server", s.Address())
	if err := setFingerprint(env, socket); err != nil {
		return err
	}
	env.Setenv("key", filepath.Join(dir, "data", "cluster.key"))
	return nil
}

// setFingerprint tells scripts what "meshd server fingerprint" prints.
func setFingerprint(env *testscript.Env, socket string) error {
	api, err := client.New(client.Config{Address: "unix://" + socket})
	if err != nil {
		return err
	}
	roots, err := api.Roots(context.Background())
	if err != nil {
		return err
	}
	env.Setenv("fingerprint", roots.Hash("mesh.example.com").String())
	return nil
}

// exits runs a command and demands its exit code: exits CODE COMMAND ARGS...
// Its output is what stdout and stderr look at next.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // Exec returns it as it is
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}
