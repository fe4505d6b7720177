package docs_test

import (
	"errors"
	"go/format"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/tests/docs"
)

// decoders holds, for every kind of file that people write, the code that
// reads it in the programs.
func decoders() map[docs.Schema]func(file string, src []byte) error {
	return map[docs.Schema]func(file string, src []byte) error{
		docs.Manifest: func(file string, src []byte) error {
			_, err := manifest.Load(file, src)
			return err
		},
		docs.Services: func(file string, src []byte) error {
			_, err := manifest.Definitions(file, src)
			return err
		},
		docs.Server: func(file string, src []byte) error {
			var c server.Config
			return manifest.DecodeConfig(file, src, &c)
		},
		docs.Agent: func(file string, src []byte) error {
			var c agent.Config
			return manifest.DecodeConfig(file, src, &c)
		},
		docs.API: func(_ string, src []byte) error {
			if v := jsontext.Value(src); !v.IsValid() {
				return errors.New("not well-formed JSON, or a name twice in one object")
			}
			return nil
		},
	}
}

// pages are the pages of the documentation, relative to the root.
func pages(t *testing.T, root fs.FS) []string {
	t.Helper()
	all := []string{"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "tests/README.md"}
	err := fs.WalkDir(root, "docs", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path.Ext(name) == ".md" {
			all = append(all, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSnippets parses or runs every fenced block of every page.
//
// One page after the other: transcripts share this machine's ports.
func TestSnippets(t *testing.T) {
	root := os.DirFS("../..")
	programs := build(t, root)
	for _, page := range pages(t, root) {
		t.Run(page, func(t *testing.T) {
			src, err := fs.ReadFile(root, page)
			if err != nil {
				t.Fatal(err)
			}
			snippets, err := docs.Snippets(page, string(src))
			if err != nil {
				t.Fatal(err)
			}
			p := checker{programs: programs, decoders: decoders()}
			for _, s := range snippets {
				p.check(t, s)
			}
		})
	}
}

// TestLinks follows every relative link of every page.
func TestLinks(t *testing.T) {
	t.Parallel()
	root := os.DirFS("../..")
	for _, page := range pages(t, root) {
		problems, err := docs.BrokenLinks(root, page)
		if err != nil {
			t.Error(err)
		}
		for _, p := range problems {
			t.Error(p)
		}
	}
}

// build builds the programs that pages tell people to type.
func build(t *testing.T, root fs.FS) docs.Programs {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", dir+string(filepath.Separator), "./cmd/...")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the programs: %v\n%s", err, out)
	}
	makefile, err := fs.ReadFile(root, "Makefile")
	if err != nil {
		t.Fatal(err)
	}
	return docs.Programs{Dir: dir, Targets: docs.MakeTargets(string(makefile))}
}

// A checker checks the snippets of one page in their order.
type checker struct {
	programs docs.Programs
	decoders map[docs.Schema]func(file string, src []byte) error
	session  *docs.Session // made by the first named file or transcript
	dev      bool          // it runs `meshd dev`
}

func (c *checker) check(t *testing.T, s docs.Snippet) {
	t.Helper()
	switch s.Lang {
	case "hcl", "yaml", "json":
		c.file(t, s)
	case "console":
		c.transcript(t, s)
	case "sh":
		c.script(t, s.Where(), s.Text)
	case "go":
		if _, err := format.Source([]byte(s.Text)); err != nil {
			t.Errorf("%s: %v", s.Where(), err)
		}
	case "text":
	default:
		t.Errorf("%s: unknown info string %q: hcl, yaml, json, console, sh, go or text", s.Where(), s.Lang)
	}
}

func (c *checker) file(t *testing.T, s docs.Snippet) {
	t.Helper()
	decode := c.decoders[s.Schema()]
	if decode == nil {
		t.Errorf("%s: nothing decodes %s files", s.Where(), s.Schema())
		return
	}
	if err := decode(s.File(), []byte(s.Text)); err != nil {
		t.Errorf("%s: as %s: %v", s.Where(), s.Schema(), err)
	}
	if s.Name != "" && s.Directive != docs.On && s.Schema() != docs.API && !strings.ContainsAny(s.Name, "*?") {
		if err := c.open(t).WriteFile(s.Name, s.Text); err != nil {
			t.Errorf("%s: %v", s.Where(), err)
		}
	}
}

// script checks commands without running them.
func (c *checker) script(t *testing.T, where, script string) {
	t.Helper()
	syntax := exec.CommandContext(t.Context(), "bash", "-n")
	syntax.Stdin = strings.NewReader(script)
	if out, err := syntax.CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", where, err, out)
		return
	}
	commands, err := docs.Commands(script)
	if err != nil {
		t.Errorf("%s: %v", where, err)
	}
	for _, command := range commands {
		if err := c.programs.Check(t.Context(), command); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
}

func (c *checker) transcript(t *testing.T, s docs.Snippet) {
	t.Helper()
	steps, err := docs.Transcript(s.Text)
	if err != nil {
		t.Errorf("%s: %v", s.Where(), err)
		return
	}
	session := c.open(t)
	if s.Directive == docs.Dev && !c.dev {
		stop, err := session.StartDev(t.Context(), c.programs)
		if err != nil {
			t.Fatalf("%s: %v", s.Where(), err)
		}
		c.dev = true
		t.Cleanup(func() {
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, step := range steps {
		c.script(t, s.Where(), step.Command)
		if s.Directive == docs.Parse || s.Directive == docs.On {
			continue
		}
		if err := session.Run(t.Context(), step); err != nil {
			t.Errorf("%s: step on line %d: %v", s.Where(), step.Line, err)
		}
	}
}

func (c *checker) open(t *testing.T) *docs.Session {
	t.Helper()
	if c.session == nil {
		c.session = c.programs.NewSession(t.TempDir())
	}
	return c.session
}
