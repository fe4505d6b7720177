package docs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Programs are the built programs of the module, and the targets of its
// Makefile: what documentation tells people to type.
type Programs struct {
	Dir     string   // holds the binaries
	Targets []string // of the Makefile
}

var makeTarget = regexp.MustCompile(`(?m)^([a-z0-9-]+):(?:[^=]|$)`)

// MakeTargets returns the targets that a Makefile spells out.
func MakeTargets(makefile string) []string {
	var targets []string
	for _, m := range makeTarget.FindAllStringSubmatch(makefile, -1) {
		targets = append(targets, m[1])
	}
	return targets
}

// Check reports whether a command, if it is one of ours, would be understood:
// the subcommand exists and takes the flags. It runs the program with its
// help flag, so nothing is done. Commands of others pass.
func (p Programs) Check(ctx context.Context, command []string) error {
	switch name := filepath.Base(command[0]); name {
	case "make":
		for _, arg := range command[1:] {
			if !strings.HasPrefix(arg, "-") && !strings.Contains(arg, "=") && !slices.Contains(p.Targets, arg) {
				return fmt.Errorf("make %s: the Makefile has no such target", arg)
			}
		}
		return nil
	case "meshctl", "meshd":
		return p.checkCobra(ctx, name, command[1:])
	case "mesh-proxy":
		return p.checkFlags(ctx, name, command[1:])
	default:
		return nil
	}
}

// checkCobra asks for the help of a subcommand with the flags given: cobra
// parses them first, so an unknown one is an error. It does not refuse an
// unknown subcommand of a subcommand, but prints the help of the parent,
// which is told by its usage line.
func (p Programs) checkCobra(ctx context.Context, name string, args []string) error {
	asked := slices.Clone(args)
	if i := slices.Index(asked, "--"); i >= 0 {
		asked = asked[:i]
	}
	out, err := p.output(ctx, name, append(asked, "--help"))
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, firstLine(out))
	}
	_, usage, ok := strings.Cut(out, "Usage:\n")
	if !ok {
		return fmt.Errorf("%s %s: its help has no usage", name, strings.Join(args, " "))
	}
	synopsis, _, _ := strings.Cut(usage, "\n\n")
	words := strings.Fields(firstLine(strings.TrimSpace(synopsis)))[1:]
	depth := 0
	for depth < min(len(words), len(args)) && words[depth] == args[depth] {
		depth++
	}
	// A group may run by itself, but what takes arguments names them here.
	arguments := slices.ContainsFunc(words[depth:], func(w string) bool { return w != "[flags]" && w != "[command]" })
	if strings.Contains(synopsis, "[command]") && !arguments && depth < len(args) && !strings.HasPrefix(args[depth], "-") {
		return fmt.Errorf("%s %s: there is no subcommand %q", name, strings.Join(args, " "), args[depth])
	}
	return nil
}

// checkFlags does the same for a program that uses package flag.
func (p Programs) checkFlags(ctx context.Context, name string, args []string) error {
	out, err := p.output(ctx, name, append(slices.Clone(args), "-h"))
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	if !strings.HasPrefix(out, "Usage") {
		return fmt.Errorf("%s %s: %s", name, strings.Join(args, " "), firstLine(out))
	}
	return nil
}

func (p Programs) output(ctx context.Context, name string, args []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(p.Dir, name), args...).CombinedOutput()
	return string(out), err
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// A Session is what the transcripts of one page share: a folder, which is
// also the home, and the programs.
type Session struct {
	dir string
	env []string
}

// NewSession makes a session in an existing, empty folder.
func (p Programs) NewSession(dir string) *Session {
	return &Session{dir: dir, env: []string{
		"PATH=" + p.Dir + string(os.PathListSeparator) + os.Getenv("PATH"),
		"HOME=" + dir, "XDG_RUNTIME_DIR=" + dir, "XDG_CONFIG_HOME=" + filepath.Join(dir, ".config"),
		"LANG=C.UTF-8", "NO_COLOR=1",
	}}
}

// WriteFile puts a file of the page into the session's folder. Names that
// start at the root are taken below it.
func (s *Session) WriteFile(name, text string) error {
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // a folder handle that was only read
	name = strings.TrimPrefix(filepath.Clean(name), "/")
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	return root.WriteFile(name, []byte(text), 0o600)
}

// Run types one step and compares what it printed. Every step is a shell of
// its own in the session's folder.
func (s *Session) Run(ctx context.Context, step Step) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := s.command(ctx, "bash", "-c", step.Command)
	out, err := cmd.CombinedOutput()
	status := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.ExitCode()
	case err != nil:
		return fmt.Errorf("%s: %w", step.Command, err)
	}
	if status != step.Status {
		return fmt.Errorf("%s: exit %d, the page says %d; it printed:\n%s", step.Command, status, step.Status, out)
	}
	if !Matches(step.Output, string(out)) {
		return fmt.Errorf("%s: printed:\n%s\nthe page says:\n%s", step.Command, out, step.Output)
	}
	return nil
}

func (s *Session) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = s.dir, s.env
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// StartDev starts `meshd dev` in the session and waits until meshctl reaches
// it. The function returned stops it and reports what went wrong, if it did
// not stop as it should.
func (s *Session) StartDev(ctx context.Context, p Programs) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var log bytes.Buffer
	dev := s.command(ctx, filepath.Join(p.Dir, "meshd"), "dev", "--data", filepath.Join(s.dir, ".dev"))
	dev.Stdout, dev.Stderr = &log, &log
	dev.Cancel = func() error { return dev.Process.Signal(os.Interrupt) }
	dev.WaitDelay = 20 * time.Second
	if err := dev.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("start meshd dev: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- dev.Wait() }()
	stop = func() error {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			return fmt.Errorf("meshd dev did not end cleanly: %w\n%s", err, log.String())
		}
		return nil
	}

	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		if s.command(ctx, filepath.Join(p.Dir, "meshctl"), "get", "nodes").Run() == nil {
			return stop, nil
		}
		select {
		case err := <-ended:
			cancel()
			return nil, fmt.Errorf("meshd dev ended: %w\n%s", err, log.String())
		case <-deadline.C:
			return nil, errors.Join(errors.New("meshctl does not reach meshd dev after a minute"), stop())
		case <-again.C:
		}
	}
}
