package docs_test

import (
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/docs"
)

func TestSnippetsOfPage(t *testing.T) {
	t.Parallel()
	const page = "# Title\n" +
		"\n" +
		"```hcl\n" +
		"# server.hcl: one per machine\n" +
		"trust_domain = \"a\"\n" +
		"```\n" +
		"- an item\n" +
		"\n" +
		"    its text\n" +
		"  ~~~~yaml services.d/web.yaml\n" +
		"  a:\n" +
		"    - ~~~\n" +
		"  ~~~~\n" +
		"\n" +
		"<!-- test: parse -->\n" +
		"```console\n" +
		"$ false\n" +
		"```\n" +
		"<!-- test: on vm-a -->\n" +
		"```console\n" +
		"$ reboot\n" +
		"```\n" +
		"<!-- test: dev -->\n" +
		"```console\n" +
		"$ true\n" +
		"```\n" +
		"````text\n" +
		"```go\n" +
		"````\n"
	got, err := docs.Snippets("a.md", page)
	if err != nil {
		t.Fatal(err)
	}
	want := []docs.Snippet{
		{Page: "a.md", Line: 3, Lang: "hcl", Name: "server.hcl", Text: "# server.hcl: one per machine\ntrust_domain = \"a\"\n"},
		{Page: "a.md", Line: 10, Lang: "yaml", Name: "services.d/web.yaml", Text: "a:\n  - ~~~\n"},
		{Page: "a.md", Line: 16, Lang: "console", Directive: docs.Parse, Text: "$ false\n"},
		{Page: "a.md", Line: 20, Lang: "console", Directive: docs.On, Host: "vm-a", Text: "$ reboot\n"},
		{Page: "a.md", Line: 24, Lang: "console", Directive: docs.Dev, Text: "$ true\n"},
		{Page: "a.md", Line: 27, Lang: "text", Directive: docs.Dev, Text: "```go\n"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("snippets (-want +got):\n%s", diff)
	}
}

func TestSnippetsRefuse(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ page, want string }{
		"no info string":    {"text\n\n```\nx\n```\n", "a.md:3: the fence has no info string that says what the block is"},
		"open":              {"```go\nx\n", "a.md:1: the fence is never closed"},
		"closed by shorter": {"````go\n```\n", "a.md:1: the fence is never closed"},
		"indented":          {"text\n\n    code\n", "a.md:3: indented code: fence it and say what it is"},
		"tab":               {"text\n\n\tcode\n", "a.md:3: indented code: fence it and say what it is"},
		"directive":         {"<!-- test: skip -->\n", `a.md:1: unknown directive "skip": dev, parse or on HOST`},
		"on nothing":        {"<!-- test: on -->\n", `a.md:1: unknown directive "on": dev, parse or on HOST`},
		"parse something":   {"<!-- test: parse vm -->\n", `a.md:1: unknown directive "parse vm": dev, parse or on HOST`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			snippets, err := docs.Snippets("a.md", tt.page)
			if err == nil {
				t.Fatalf("no error; snippets %+v", snippets)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSchema(t *testing.T) {
	t.Parallel()
	tests := []struct {
		lang, name string
		schema     docs.Schema
		file       string
	}{
		{"hcl", "", docs.Manifest, "snippet.hcl"},
		{"hcl", "intentions.hcl", docs.Manifest, "intentions.hcl"},
		{"hcl", "/etc/meshd/server.hcl", docs.Server, "server.hcl"},
		{"json", "server.json", docs.Server, "server.json"},
		{"yaml", "agent.yaml", docs.Agent, "agent.yaml"},
		{"hcl", "services.d/web.hcl", docs.Services, "web.hcl"},
		{"hcl", "/etc/meshd/services.d/*.hcl", docs.Services, "snippet.hcl"},
		{"json", "api", docs.API, "snippet.json"},
		{"yaml", "", docs.Manifest, "snippet.yaml"},
	}
	for _, tt := range tests {
		s := docs.Snippet{Lang: tt.lang, Name: tt.name}
		if s.Schema() != tt.schema || s.File() != tt.file {
			t.Errorf("%s %q: got %s, %s; want %s, %s", tt.lang, tt.name, s.Schema(), s.File(), tt.schema, tt.file)
		}
	}
}

func TestBrokenLinks(t *testing.T) {
	t.Parallel()
	fsys := fstest.MapFS{
		"README.md": {Data: []byte("[a](docs/a.md) [b](docs/b.md) [c](https://example.com/x)\n" +
			"[d](docs/a.md#the-wire-v2) [e](docs/a.md#nowhere) [f](#top) [g](../x)\n" +
			"`[not](a-link)`\n```text\n[nor](this)\n# Top\n```\n# Top\n")},
		"docs/a.md": {Data: []byte("## The *wire*, v2\n```sh\n# nowhere\n```\n[up](../README.md) [dir](.)\n")},
	}
	tests := map[string][]string{
		"README.md": {
			"README.md:1: docs/b.md: there is no such file",
			"README.md:2: docs/a.md#nowhere: there is no such heading",
			"README.md:2: ../x: leads out of the repository",
		},
		"docs/a.md": nil,
	}
	for page, want := range tests {
		got, err := docs.BrokenLinks(fsys, page)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", page, diff)
		}
	}
}
