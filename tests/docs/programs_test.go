package docs_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/meshd/meshd/tests/docs"
)

// TestMain lets the test binary stand in for the programs: what is tested is
// how real cobra and package flag answer, not a copy of their texts.
func TestMain(m *testing.M) {
	program := os.Getenv("DOCS_TEST_PROGRAM")
	if program == "" {
		os.Exit(m.Run()) //nolint:forbidigo // this is main
	}
	if err := standIn(program, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func standIn(program string, args []string) error {
	if program == "mesh-proxy" {
		flags := flag.NewFlagSet(program, flag.ContinueOnError)
		flags.String("feed", "", "socket")
		return flags.Parse(args)
	}
	root := &cobra.Command{Use: program, SilenceUsage: true}
	intention := &cobra.Command{Use: "intention", Short: "who may call whom"}
	allow := &cobra.Command{Use: "allow SRC DST", Args: cobra.ExactArgs(2), RunE: func(*cobra.Command, []string) error { return nil }}
	allow.Flags().StringArray("http", nil, "")
	allow.Flags().Bool("wait", false, "")
	intention.AddCommand(allow)
	dev := &cobra.Command{Use: "dev", RunE: func(*cobra.Command, []string) error { return standInDev() }}
	dev.Flags().String("data", "", "")
	get := &cobra.Command{Use: "get KIND", RunE: func(*cobra.Command, []string) error {
		_, err := os.Stat("dev-is-up")
		return err
	}}
	run := func(*cobra.Command, []string) error { return nil }
	ca := &cobra.Command{Use: "ca", Args: cobra.ArbitraryArgs, RunE: run}
	ca.AddCommand(&cobra.Command{Use: "roots", RunE: run})
	token := &cobra.Command{Use: "token NAME", Args: cobra.ArbitraryArgs, RunE: run}
	token.AddCommand(&cobra.Command{Use: "join", RunE: run})
	root.AddCommand(intention, dev, get, ca, token)
	root.SetArgs(args)
	return root.Execute()
}

// standInDev runs until it is interrupted, like `meshd dev`.
func standInDev() error {
	if os.Getenv("DOCS_TEST_BROKEN") != "" {
		return errors.New("port 7400 is taken")
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	if err := os.WriteFile("dev-is-up", nil, 0o600); err != nil {
		return err
	}
	<-interrupted
	return os.Remove("dev-is-up")
}

// standIns puts all three programs into a folder of their own; extra is set
// in their environment.
func standIns(t *testing.T, extra string) docs.Programs {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"meshctl", "meshd", "mesh-proxy"} {
		script := fmt.Sprintf("#!/bin/sh\nexec env DOCS_TEST_PROGRAM=%s %s '%s' \"$@\"\n", name, extra, self)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return docs.Programs{Dir: dir, Targets: docs.MakeTargets("A := b\n.PHONY: test\ntest: build ## all\nrun-it:\n\tx\n")}
}

func TestProgramsCheck(t *testing.T) {
	t.Parallel()
	programs := standIns(t, "")
	tests := []struct{ command, want string }{
		{"meshctl intention allow web api --http GET", ""},
		{"/usr/bin/meshctl intention allow --wait web api", ""},
		{"meshctl intention allow web api -- --odd", ""},
		{"meshctl intention", ""},
		{"meshctl", ""},
		{"meshd dev --data x", ""},
		{"mesh-proxy -feed x", ""},
		{"make test FUZZTIME=1s -j", ""},
		{"curl --no-such-flag", ""},
		{"meshctl intention allow web api --htp GET", "meshctl intention allow web api --htp GET: exit status 1: Error: unknown flag: --htp"},
		{"meshctl intention permit web api", `meshctl intention permit web api: there is no subcommand "permit"`},
		{"meshctl ca", ""},
		{"meshctl ca roots", ""},
		{"meshctl token join", ""},
		{"meshctl token ci", ""},
		{"meshctl ca root", `meshctl ca root: there is no subcommand "root"`},
		{"meshctl intend", `meshctl intend: exit status 1: Error: unknown command "intend" for "meshctl"`},
		{"mesh-proxy -fed x", "mesh-proxy -fed x: flag provided but not defined: -fed"},
		{"make tset", "make tset: the Makefile has no such target"},
	}
	for _, tt := range tests {
		t.Run(tt.command, func(t *testing.T) {
			t.Parallel()
			got := ""
			if err := programs.Check(t.Context(), strings.Fields(tt.command)); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSession(t *testing.T) {
	t.Parallel()
	programs := standIns(t, "")
	session := programs.NewSession(t.TempDir())
	if err := session.WriteFile("/etc/meshd/server.hcl", "a = 1\n"); err != nil {
		t.Fatal(err)
	}
	if err := session.WriteFile("../out.hcl", "a = 1\n"); err == nil {
		t.Error("a file outside the session's folder was written")
	}
	tests := []struct {
		step docs.Step
		want string
	}{
		{docs.Step{Command: "cat etc/meshd/server.hcl", Output: "a = 1\n"}, ""},
		{docs.Step{Command: "cd ~ && ls", Output: "etc\n"}, ""},
		{docs.Step{Command: "meshctl intention allow web api"}, ""},
		{docs.Step{Command: "echo no >&2; exit 3", Status: 3, Output: "…\n"}, ""},
		{docs.Step{Command: "exit 3"}, "exit 3: exit 3, the page says 0; it printed:\n"},
		{docs.Step{Command: "echo a", Output: "b\n"}, "echo a: printed:\na\n\nthe page says:\nb\n"},
	}
	for _, tt := range tests {
		got := ""
		if err := session.Run(t.Context(), tt.step); err != nil {
			got = err.Error()
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: error (-want +got):\n%s", tt.step.Command, diff)
		}
	}
}

func TestStartDev(t *testing.T) {
	t.Parallel()
	programs := standIns(t, "")
	session := programs.NewSession(t.TempDir())
	stop, err := session.StartDev(t.Context(), programs)
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Run(t.Context(), docs.Step{Command: "meshctl get nodes"}); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := session.Run(t.Context(), docs.Step{Command: "ls"}); err != nil {
		t.Errorf("after the end: %v", err)
	}

	broken := standIns(t, "DOCS_TEST_BROKEN=1")
	_, err = broken.NewSession(t.TempDir()).StartDev(t.Context(), broken)
	want := "meshd dev ended: exit status 1\nError: port 7400 is taken\nport 7400 is taken\n"
	if err == nil || err.Error() != want {
		t.Errorf("got error %q, want %q", err, want)
	}
}
