package arch_test

import (
	"debug/buildinfo"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/tests/arch"
)

var update = flag.Bool("update", false, "write testdata/mesh-proxy.deps anew")

// TestMeshProxyModules asserts what is linked into mesh-proxy: every host and
// every sidecar runs it, in front of every byte, so a new module is a
// decision, not an accident.
func TestMeshProxyModules(t *testing.T) {
	t.Parallel()
	// go test cannot see what the compiler below reads. Loading the source
	// here makes the cached result of this test depend on it.
	if _, err := arch.Load(os.DirFS("../..")); err != nil {
		t.Fatal(err)
	}
	modules := linked(t, "./cmd/mesh-proxy")

	for _, no := range []string{
		"github.com/hashicorp/consul",
		"github.com/hashicorp/hcl",
		"github.com/hashicorp/raft",
		"github.com/smallstep",
		"github.com/spf13/cobra",
		"github.com/zclconf/go-cty",
		"go.etcd.io",
		"go.step.sm",
		"go.yaml.in/yaml",
		"google.golang.org/grpc",
		"gopkg.in/yaml",
	} {
		for _, m := range modules {
			if strings.HasPrefix(m, no) {
				t.Errorf("mesh-proxy links %s: it holds no storage, signs nothing, parses no files that people write and calls no server", m)
			}
		}
	}

	const golden = "testdata/mesh-proxy.deps"
	text := "# Modules linked into mesh-proxy. After a change that was decided:\n" +
		"#\tgo test ./tests/arch -run TestMeshProxyModules -update\n" + strings.Join(modules, "\n") + "\n"
	if *update {
		if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("modules linked into mesh-proxy (-%s +binary):\n%s", golden, diff)
	}
}

// linked builds one of the module's programs and returns the paths of the
// other modules in it, sorted.
func linked(t *testing.T, program string) []string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "program")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-o", binary, program)
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", program, err, out)
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	var modules []string
	for _, m := range info.Deps {
		modules = append(modules, m.Path)
	}
	slices.Sort(modules)
	return modules
}
