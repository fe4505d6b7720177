package arch

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// MaxLines is how long a file that people write may be.
const MaxLines = 600

// Check holds the module at the root of fsys to every rule and returns what
// breaks one, sorted. An error means that nothing could be checked.
func Check(fsys fs.FS) ([]string, error) {
	tree, err := Load(fsys)
	if err != nil {
		return nil, err
	}
	rows, err := Table(fsys)
	if err != nil {
		return nil, err
	}
	problems := slices.Concat(
		tree.againstTable(rows),
		tree.layers(),
		tree.comments(),
		tree.folders(),
		tree.files(),
	)
	slices.Sort(problems)
	return problems, nil
}

// againstTable holds the code to the table and the table to the code. tests/
// has no rows: it may import anything, and layers lets nobody import it.
func (t *Tree) againstTable(rows []Row) []string {
	var problems []string
	report := func(format string, args ...any) {
		problems = append(problems, fmt.Sprintf(format, args...))
	}
	listed := map[string]Row{}
	for _, row := range rows {
		if first, twice := listed[row.Package]; twice {
			report("%s:%d: %s has a row already, on line %d", TablePath, row.Line, row.Package, first.Line)
			continue
		}
		listed[row.Package] = row
		p := t.Packages[row.Package]
		if p == nil {
			report("%s:%d: %s is listed but there is no such package: delete the row", TablePath, row.Line, row.Package)
			continue
		}
		for _, dep := range p.Imports {
			if !slices.Contains(row.Imports, dep) {
				report("%s imports %s, which %s:%d does not allow", row.Package, dep, TablePath, row.Line)
			}
		}
		for _, dep := range row.Imports {
			if !slices.Contains(p.Imports, dep) {
				report("%s:%d: %s may import %s but does not: tighten the row", TablePath, row.Line, row.Package, dep)
			}
		}
	}
	for name, p := range t.Packages {
		if _, ok := listed[name]; !ok && !within(name, "tests") {
			report("%s has no row in %s: add | `%s` | what for | %s |", name, TablePath, name, importsCell(p))
		}
	}
	return problems
}

// importsCell is how a row spells a package's imports.
func importsCell(p *Package) string {
	if len(p.Imports) == 0 {
		return "-"
	}
	return "`" + strings.Join(p.Imports, "` `") + "`"
}

// layers are the rules that no row may relax.
func (t *Tree) layers() []string {
	var problems []string
	for name, p := range t.Packages {
		for _, dep := range p.Imports {
			if why := forbidden(name, dep); why != "" {
				problems = append(problems, fmt.Sprintf("%s imports %s: %s", name, dep, why))
			}
		}
	}
	return problems
}

// forbidden says why the package name must not import dep, or "".
func forbidden(name, dep string) string {
	for _, vocabulary := range []string{"catalog", "ca", "intentions", "proxy"} {
		// ca/spiffe is a leaf: the vocabulary of the vocabulary.
		if name == vocabulary && strings.HasPrefix(dep, vocabulary+"/") && dep != "ca/spiffe" {
			return "a root of nouns and contracts knows no child that implements them"
		}
	}
	for _, machine := range []string{"server", "agent"} {
		if dep == machine && strings.HasPrefix(name, machine+"/") {
			return "a part does not know the machine that it is built into"
		}
	}
	switch {
	case within(dep, "tests") && !within(name, "tests"):
		return "nobody imports tests"
	case within(name, "agent") && within(dep, "server") && dep != "server/meshpb" && dep != "server/client":
		return "agent and server meet only through server/meshpb and server/client"
	case within(name, "server") && within(dep, "agent"):
		return "agent and server meet only through server/meshpb and server/client"
	default:
		return ""
	}
}

// comments wants one package comment per package, so that it has one place.
func (t *Tree) comments() []string {
	var problems []string
	for name, p := range t.Packages {
		switch len(p.Comments) {
		case 0:
			problems = append(problems, name+" has no package comment")
		case 1:
		default:
			problems = append(problems, fmt.Sprintf("%s has %d package comments, want 1: %s",
				name, len(p.Comments), strings.Join(p.Comments, ", ")))
		}
	}
	return problems
}

// folders wants the top level as it was agreed on, and every package named
// for what it provides.
func (t *Tree) folders() []string {
	topLevel := []string{
		"agent", "ansible", "ca", "catalog", "cmd", "docs", "intentions",
		"nomad", "proxy", "server", "terraform", "tests",
	}
	vague := []string{
		"base", "common", "helper", "helpers", "misc",
		"type", "types", "util", "utils",
	}
	var problems []string
	for _, name := range t.Folders {
		if slices.Contains(vague, path.Base(name)) {
			problems = append(problems, name+": a folder is named for what it provides, not "+path.Base(name))
		}
		if !strings.Contains(name, "/") && !slices.Contains(topLevel, name) && !t.onlyForTools(name) {
			problems = append(problems, fmt.Sprintf("%s: not a folder of the top level, which has %s",
				name, strings.Join(topLevel, " ")))
		}
	}
	return problems
}

// onlyForTools reports whether a folder holds nothing but Go files that no
// build includes, such as a list of tools to pin.
func (t *Tree) onlyForTools(folder string) bool {
	return t.unbuilt[folder] && !slices.ContainsFunc(t.Files, func(f File) bool { return within(f.Path, folder) })
}

// files holds single files to what reviewers would otherwise have to count.
func (t *Tree) files() []string {
	var problems []string
	for _, f := range t.Files {
		if f.Generated {
			continue
		}
		if f.Lines > MaxLines {
			problems = append(problems, fmt.Sprintf("%s has %d lines, more than %d: split it by noun", f.Path, f.Lines, MaxLines))
		}
		for _, line := range f.Inits {
			problems = append(problems, fmt.Sprintf("%s:%d: func init hides an order: use an explicit table or call", f.Path, line))
		}
	}
	return problems
}

// within reports whether name is folder or lies in it.
func within(name, folder string) bool {
	return name == folder || strings.HasPrefix(name, folder+"/")
}
