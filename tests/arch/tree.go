// Package arch checks the code base as a whole: that the imports between
// packages are those of the table in docs/ARCHITECTURE.md, and the rules of
// shape that no single package's tests can see.
//
// It reads the source itself rather than what `go list` prints: go test knows
// which files a test opened and runs it again when one of them changes, but
// it cannot know what a child process read.
package arch

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A Tree is the source of one module. Paths are slash-separated and relative
// to the module's root, which is ".".
type Tree struct {
	// Module is the module's path.
	Module string
	// Folders are all folders but those that hold no source: hidden ones,
	// testdata, and what .gitignore names as built at the top level.
	Folders []string
	// Packages are the folders that hold Go files which some build includes.
	Packages map[string]*Package
	// Files are the Go files of Packages, and test files.
	Files []File

	// unbuilt are the folders that hold a Go file which no build includes.
	unbuilt map[string]bool
}

// A Package is one folder's code without its tests.
type Package struct {
	// Imports are the packages of the same module that it imports, sorted.
	Imports []string
	// Comments are the names of the files that carry a package comment.
	Comments []string
}

// A File is one Go file.
type File struct {
	Path      string
	Lines     int
	Test      bool
	Generated bool
	Inits     []int // lines on which an init function starts
}

// Load reads the module at the root of fsys. It fails on the first file that
// cannot be read or parsed.
func Load(fsys fs.FS) (*Tree, error) {
	module, err := moduleOf(fsys)
	if err != nil {
		return nil, err
	}
	built, err := builtFolders(fsys)
	if err != nil {
		return nil, err
	}
	t := &Tree{Module: module, Packages: map[string]*Package{}, unbuilt: map[string]bool{}}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name == ".":
			return nil
		case d.IsDir():
			if n := d.Name(); n == "testdata" || strings.HasPrefix(n, ".") || built[name] {
				return fs.SkipDir
			}
			t.Folders = append(t.Folders, name)
			return nil
		case path.Ext(name) == ".go" && d.Type().IsRegular():
			return t.add(fsys, name)
		default:
			return nil
		}
	})
	if err != nil {
		return nil, fmt.Errorf("load module %s: %w", module, err)
	}
	return t, nil
}

func moduleOf(fsys fs.FS) (string, error) {
	text, err := fs.ReadFile(fsys, "go.mod")
	if err != nil {
		return "", fmt.Errorf("find the module's path: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "module" {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("find the module's path: go.mod has no module line")
}

// builtFolders are the entries of .gitignore of the form /name/.
func builtFolders(fsys fs.FS) (map[string]bool, error) {
	text, err := fs.ReadFile(fsys, ".gitignore")
	if err != nil {
		return nil, fmt.Errorf("find the folders that are built: %w", err)
	}
	built := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "/") && strings.HasSuffix(line, "/") {
			built[strings.Trim(line, "/")] = true
		}
	}
	return built, nil
}

// add parses one file and enters it into its package, unless no build
// includes it (a file behind a tag of its own is a note to tools, not code).
func (t *Tree) add(fsys fs.FS, name string) error {
	src, err := fs.ReadFile(fsys, name)
	if err != nil {
		return err
	}
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	if ok, err := buildable(f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	} else if !ok {
		t.unbuilt[path.Dir(name)] = true
		return nil
	}
	file := File{
		Path:      name,
		Lines:     bytes.Count(src, []byte("\n")),
		Test:      strings.HasSuffix(name, "_test.go"),
		Generated: ast.IsGenerated(f),
		Inits:     inits(fset, f),
	}
	t.Files = append(t.Files, file)
	if file.Test {
		return nil
	}
	dir := path.Dir(name)
	p := t.Packages[dir]
	if p == nil {
		p = &Package{}
		t.Packages[dir] = p
	}
	if f.Doc != nil && strings.TrimSpace(f.Doc.Text()) != "" {
		p.Comments = append(p.Comments, path.Base(name))
	}
	for _, spec := range f.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return fmt.Errorf("%s: import %s: %w", name, spec.Path.Value, err)
		}
		if dep, ours := strings.CutPrefix(imported, t.Module+"/"); ours && !slices.Contains(p.Imports, dep) {
			p.Imports = append(p.Imports, dep)
		}
	}
	slices.Sort(p.Imports)
	return nil
}

// inits returns the lines on which f declares func init().
func inits(fset *token.FileSet, f *ast.File) []int {
	var lines []int
	for _, decl := range f.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
			lines = append(lines, fset.Position(fn.Pos()).Line)
		}
	}
	return lines
}

// buildable reports whether a build without tags of our own includes f on one
// of the platforms that the tags of the standard library tell apart here.
func buildable(f *ast.File) (bool, error) {
	for _, group := range f.Comments {
		if group.Pos() > f.Package {
			break
		}
		for _, c := range group.List {
			if !constraint.IsGoBuild(c.Text) {
				continue
			}
			expr, err := constraint.Parse(c.Text)
			if err != nil {
				return false, err
			}
			return onSomePlatform(expr), nil
		}
	}
	return true, nil
}

func onSomePlatform(expr constraint.Expr) bool {
	for _, goos := range []string{"linux", "darwin", "freebsd", "windows"} {
		for _, goarch := range []string{"amd64", "arm64"} {
			for _, race := range []bool{false, true} {
				if expr.Eval(func(tag string) bool {
					switch tag {
					case goos, goarch, "gc", "cgo":
						return true
					case "unix":
						return goos != "windows"
					case "race":
						return race
					default:
						return strings.HasPrefix(tag, "go1.")
					}
				}) {
					return true
				}
			}
		}
	}
	return false
}
