package arch_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/arch"
)

// TestImports holds the code to the table of docs/ARCHITECTURE.md, the table
// to the code, and both to the rules of shape.
func TestImports(t *testing.T) {
	t.Parallel()
	problems, err := arch.Check(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

// sound is a module that breaks no rule.
func sound() map[string]string {
	return map[string]string{
		"go.mod":     "module example.com/m\n\ngo 1.26\n",
		".gitignore": "/bin/\n*.test\n",
		"docs/ARCHITECTURE.md": "# Design\n\n| process | where |\n|---|---|\n| `serve` | here |\n\n" +
			"| package | purpose | imports |\n|---|---|---|\n" +
			"| `ca/spiffe` | names | - |\n" +
			"| `catalog` | nouns | `ca/spiffe` |\n" +
			"| `server/store` | keys | - |\n" +
			"| `server` | composes | `catalog` `server/store` |\n" +
			"| `agent` | composes | `catalog` |\n",
		"ca/spiffe/id.go":         "// Package spiffe names.\npackage spiffe\n",
		"catalog/catalog.go":      "// Package catalog has nouns.\npackage catalog\n\nimport (\n\t\"fmt\"\n\n\t\"example.com/m/ca/spiffe\"\n)\n",
		"catalog/node.go":         "package catalog\n\nimport \"example.com/m/ca/spiffe\"\n",
		"catalog/catalog_test.go": "// Tests import what they like.\npackage catalog_test\n\nimport \"example.com/m/server\"\n",
		"server/store/store.go":   "// Package store keeps.\npackage store\n",
		"server/server.go":        "// Package server composes.\npackage server\n\nimport (\n\t\"example.com/m/catalog\"\n\t\"example.com/m/server/store\"\n)\n",
		"agent/agent.go":          "// Package agent composes.\npackage agent\n\nimport \"example.com/m/catalog\"\n",
		"tests/e2e/e2e.go":        "// Package e2e tests.\npackage e2e\n\nimport \"example.com/m/server\"\n",
		"catalog/testdata/bad.go": "package bad\n\nimport \"example.com/m/nowhere\"\n\nfunc init() {}\n",
		"pins/pins.go":            "//go:build pins\n\npackage pins\n\nimport _ \"example.com/m/agent\"\n",
		"bin/tool/main.go":        "package main\n",
		".cache/util/util.go":     "package util\n",
	}
}

// plant returns the sound module with files added or, where the text is
// empty, removed.
func plant(files map[string]string) fstest.MapFS {
	all := sound()
	maps.Copy(all, files)
	fsys := fstest.MapFS{}
	for name, text := range all {
		if text != "" {
			fsys[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
		}
	}
	return fsys
}

// withRow returns the page with one row added at its end.
func withRow(row string) string {
	return sound()["docs/ARCHITECTURE.md"] + row + "\n"
}

// TestCheck plants one fault at a time into a sound module.
func TestCheck(t *testing.T) {
	t.Parallel()
	long := "// Package store keeps.\npackage store\n" + strings.Repeat("\n", arch.MaxLines-1)
	tests := map[string]struct {
		files map[string]string
		want  []string
	}{
		"sound": {},
		"import that the row does not allow": {
			files: map[string]string{"agent/agent.go": "// Package agent composes.\npackage agent\n\nimport (\n\t\"example.com/m/ca/spiffe\"\n\t\"example.com/m/catalog\"\n)\n"},
			want:  []string{"agent imports ca/spiffe, which docs/ARCHITECTURE.md:13 does not allow"},
		},
		"import that the row allows and nobody needs": {
			files: map[string]string{"agent/agent.go": "// Package agent composes.\npackage agent\n"},
			want:  []string{"docs/ARCHITECTURE.md:13: agent may import catalog but does not: tighten the row"},
		},
		"package without a row": {
			files: map[string]string{"agent/leaf/leaf.go": "// Package leaf renews.\npackage leaf\n\nimport (\n\t\"example.com/m/ca/spiffe\"\n\t\"example.com/m/catalog\"\n)\n"},
			want:  []string{"agent/leaf has no row in docs/ARCHITECTURE.md: add | `agent/leaf` | what for | `ca/spiffe` `catalog` |"},
		},
		"package for one platform without a row": {
			files: map[string]string{"agent/leaf/leaf.go": "//go:build !linux && go1.26\n\n// Package leaf renews.\npackage leaf\n"},
			want:  []string{"agent/leaf has no row in docs/ARCHITECTURE.md: add | `agent/leaf` | what for | - |"},
		},
		"row without a package": {
			files: map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent/dns` | names | - |")},
			want:  []string{"docs/ARCHITECTURE.md:14: agent/dns is listed but there is no such package: delete the row"},
		},
		"row of a package that only tests have": {
			files: map[string]string{
				"docs/ARCHITECTURE.md":     withRow("| `agent/dns` | names | - |"),
				"agent/dns/server_test.go": "package dns_test\n",
			},
			want: []string{"docs/ARCHITECTURE.md:14: agent/dns is listed but there is no such package: delete the row"},
		},
		"row twice": {
			files: map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent` | composes | `catalog` |")},
			want:  []string{"docs/ARCHITECTURE.md:14: agent has a row already, on line 13"},
		},
		"no package comment": {
			files: map[string]string{"agent/agent.go": "package agent\n\nimport \"example.com/m/catalog\"\n"},
			want:  []string{"agent has no package comment"},
		},
		"no package comment in tests": {
			files: map[string]string{"tests/e2e/e2e.go": "package e2e\n"},
			want:  []string{"tests/e2e has no package comment"},
		},
		"two package comments": {
			files: map[string]string{"catalog/node.go": "// Package catalog again.\npackage catalog\n\nimport \"example.com/m/ca/spiffe\"\n"},
			want:  []string{"catalog has 2 package comments, want 1: catalog.go, node.go"},
		},
		"root that knows its child": {
			files: map[string]string{
				"catalog/manifest/manifest.go": "// Package manifest reads.\npackage manifest\n",
				"catalog/node.go":              "package catalog\n\nimport (\n\t\"example.com/m/ca/spiffe\"\n\t\"example.com/m/catalog/manifest\"\n)\n",
				"docs/ARCHITECTURE.md": strings.Replace(withRow("| `catalog/manifest` | files | - |"),
					"| nouns | `ca/spiffe` |", "| nouns | `ca/spiffe` `catalog/manifest` |", 1),
			},
			want: []string{"catalog imports catalog/manifest: a root of nouns and contracts knows no child that implements them"},
		},
		"part that knows its machine": {
			files: map[string]string{
				"server/api/api.go":    "// Package api serves.\npackage api\n\nimport \"example.com/m/server\"\n",
				"docs/ARCHITECTURE.md": withRow("| `server/api` | serves | `server` |"),
			},
			want: []string{"server/api imports server: a part does not know the machine that it is built into"},
		},
		"agent that knows the server": {
			files: map[string]string{
				"agent/view/view.go":   "// Package view watches.\npackage view\n\nimport \"example.com/m/server/store\"\n",
				"docs/ARCHITECTURE.md": withRow("| `agent/view` | watches | `server/store` |"),
			},
			want: []string{"agent/view imports server/store: agent and server meet only through server/meshpb and server/client"},
		},
		"server that knows the agent": {
			files: map[string]string{
				"server/rpc/rpc.go":    "// Package rpc serves.\npackage rpc\n\nimport \"example.com/m/agent\"\n",
				"docs/ARCHITECTURE.md": withRow("| `server/rpc` | serves | `agent` |"),
			},
			want: []string{"server/rpc imports agent: agent and server meet only through server/meshpb and server/client"},
		},
		"code that imports tests": {
			files: map[string]string{
				"cmd/x/main.go":        "// Command x runs.\npackage main\n\nimport \"example.com/m/tests/e2e\"\n",
				"docs/ARCHITECTURE.md": withRow("| `cmd/x` | runs | `tests/e2e` |"),
			},
			want: []string{"cmd/x imports tests/e2e: nobody imports tests"},
		},
		"vague folder": {
			files: map[string]string{
				"server/util/util.go":  "// Package util has all.\npackage util\n",
				"docs/ARCHITECTURE.md": withRow("| `server/util` | all | - |"),
			},
			want: []string{"server/util: a folder is named for what it provides, not util"},
		},
		"folder at the top level": {
			files: map[string]string{"scripts/install.sh": "exit 0\n"},
			want: []string{"scripts: not a folder of the top level, which has " +
				"agent ansible ca catalog cmd docs intentions nomad proxy server terraform tests"},
		},
		"init": {
			files: map[string]string{"server/store/store.go": "// Package store keeps.\npackage store\n\nfunc init() {}\n"},
			want:  []string{"server/store/store.go:4: func init hides an order: use an explicit table or call"},
		},
		"init in a test": {
			files: map[string]string{"server/store/store_test.go": "package store_test\n\nfunc init() {}\n"},
			want:  []string{"server/store/store_test.go:3: func init hides an order: use an explicit table or call"},
		},
		"method named init": {
			files: map[string]string{"server/store/store.go": "// Package store keeps.\npackage store\n\ntype s struct{}\n\nfunc (s) init() {}\n"},
		},
		"long file": {
			files: map[string]string{"server/store/store.go": long},
			want:  []string{fmt.Sprintf("server/store/store.go has %d lines, more than %d: split it by noun", arch.MaxLines+1, arch.MaxLines)},
		},
		"long generated file": {
			files: map[string]string{"server/store/store.go": "// Code generated by x. DO NOT EDIT.\n\n" + long + "\nfunc init() {}\n"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := arch.Check(plant(tt.files))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

// TestCheckUnreadable is about modules of which nothing can be said: a page
// that the parser does not understand must not pass as an empty one.
func TestCheckUnreadable(t *testing.T) {
	t.Parallel()
	page := sound()["docs/ARCHITECTURE.md"]
	tests := map[string]struct {
		files map[string]string
		want  string
	}{
		"no page": {
			map[string]string{"docs/ARCHITECTURE.md": ""},
			"read the table of packages: open docs/ARCHITECTURE.md: file does not exist",
		},
		"no table": {
			map[string]string{"docs/ARCHITECTURE.md": "# Design\n"},
			"docs/ARCHITECTURE.md has 0 tables headed | package | purpose | imports |, want 1",
		},
		"two tables": {
			map[string]string{"docs/ARCHITECTURE.md": page + "\n| package | purpose | imports |\n|---|---|---|\n"},
			"docs/ARCHITECTURE.md has 2 tables headed | package | purpose | imports |, want 1",
		},
		"commas": {
			map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent/dns` | names | `catalog`, `ca` |")},
			"docs/ARCHITECTURE.md:14: \"`catalog`,\" is not one package in backquotes",
		},
		"two packages in a row": {
			map[string]string{"docs/ARCHITECTURE.md": withRow("| `ca/builtin`, `ca/vault` | authorities | - |")},
			"docs/ARCHITECTURE.md:14: \"`ca/builtin`, `ca/vault`\" is not one package in backquotes",
		},
		"no imports cell": {
			map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent/dns` | names | |")},
			"docs/ARCHITECTURE.md:14: row of agent/dns lists no imports: write - for none",
		},
		"no purpose": {
			map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent/dns` | | - |")},
			"docs/ARCHITECTURE.md:14: row of agent/dns says no purpose",
		},
		"four cells": {
			map[string]string{"docs/ARCHITECTURE.md": withRow("| `agent/dns` | a | b | - |")},
			"docs/ARCHITECTURE.md:14: row has 4 cells, want 3",
		},
		"no module": {
			map[string]string{"go.mod": "go 1.26\n"},
			"find the module's path: go.mod has no module line",
		},
		"no Go": {
			map[string]string{"agent/agent.go": "package\n"},
			"load module example.com/m: agent/agent.go:1:9: expected 'IDENT', found 'EOF'",
		},
		"no constraint": {
			map[string]string{"agent/agent.go": "//go:build linux &&\n\npackage agent\n"},
			"load module example.com/m: agent/agent.go: unexpected end of expression",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			problems, err := arch.Check(plant(tt.files))
			if err == nil {
				t.Fatalf("no error; problems %q", problems)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

// TestLoad shows what counts as the module's source.
func TestLoad(t *testing.T) {
	t.Parallel()
	tree, err := arch.Load(plant(nil))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"agent", "ca/spiffe", "catalog", "server", "server/store", "tests/e2e"}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(tree.Packages))); diff != "" {
		t.Errorf("packages (-want +got):\n%s", diff)
	}
	folders := []string{"agent", "ca", "ca/spiffe", "catalog", "docs", "pins", "server", "server/store", "tests", "tests/e2e"}
	if diff := cmp.Diff(folders, tree.Folders); diff != "" {
		t.Errorf("folders (-want +got):\n%s", diff)
	}
}
