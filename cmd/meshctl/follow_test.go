package main_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// followed is a command that runs beside its script.
type (
	followedKey struct{}
	followed    struct {
		cmd   *exec.Cmd
		lines chan string
	}
)

func following(ts *testscript.TestScript) *followed {
	f, ok := ts.Value(followedKey{}).(*followed)
	if !ok {
		ts.Fatalf("the script's setup made no room for what is followed")
	}
	return f
}

// follow starts a command whose output sees reads, until interrupt ends it.
func follow(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: follow COMMAND ARGS...")
	}
	f := following(ts)
	f.cmd = exec.Command(filepath.Join(bin, args[0]), args[1:]...)
	f.lines = make(chan string, 100)
	f.cmd.Dir, f.cmd.Env = ts.Getenv("WORK"), []string{"MESH_ADDR=" + ts.Getenv("MESH_ADDR")}
	out, err := f.cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(f.cmd.Start())
	ts.Defer(func() { _ = f.cmd.Process.Kill() })
	go func() {
		defer close(f.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			f.lines <- s.Text()
		}
	}()
}

// sees reads lines until one matches.
func sees(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: sees PATTERN")
	}
	want := regexp.MustCompile(args[0])
	late := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-following(ts).lines:
			ts.Logf("%s", line)
			if !ok {
				ts.Fatalf("it ended before %q", args[0])
			}
			if want.MatchString(line) {
				return
			}
		case <-late:
			ts.Fatalf("no line like %q", args[0])
		}
	}
}

// interrupt ends what is followed, which must say that all was well.
func interrupt(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: interrupt")
	}
	f := following(ts)
	ts.Check(f.cmd.Process.Signal(os.Interrupt))
	for range f.lines { // to its end
	}
	ts.Check(f.cmd.Wait())
}
