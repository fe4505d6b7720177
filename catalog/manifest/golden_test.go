package manifest_test

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
)

var update = flag.Bool("update", false, "write what the code returns into testdata")

// A config is a stand-in for a server's or an agent's configuration.
type config struct {
	TrustDomain string           `json:"trust_domain"`
	Servers     []string         `json:"servers"`
	Expect      int              `json:"bootstrap_expect"`
	Level       uint8            `json:"level"`
	Ratio       float64          `json:"ratio"`
	Debug       bool             `json:"debug"`
	CA          configCA         `json:"ca"`
	Join        *configJoin      `json:"join"`
	Labels      map[string]int64 `json:"labels"`
	internal    int
}

type configCA struct {
	LeafTTL catalog.Duration `json:"leaf_ttl"`
}

type configJoin struct {
	TokenFile string `json:"token_file"`
}

func (c config) Validate() error {
	var p catalog.Problems
	if c.CA.LeafTTL.Std() < 0 || c.internal != 0 {
		p.Add("ca.leaf_ttl", "%s is less than 1h: write 1h to 720h", c.CA.LeafTTL)
	}
	if c.TrustDomain == "" {
		p.Add("trust_domain", "missing: write the name of the mesh")
	}
	return p.Err()
}

// show returns what a reader makes of a file: the values in YAML, or the error.
func show(read func(file string, data []byte) ([]byte, error), file string, data []byte) string {
	out, err := read(file, data)
	if err == nil {
		return string(out)
	}
	if len(manifest.Errors(err)) == 0 || !errors.Is(err, manifest.ErrInvalid) {
		return "NOT AN ERROR OF THE FILE: " + err.Error() + "\n"
	}
	return "error:\n" + err.Error() + "\n"
}

func readResources(file string, data []byte) ([]byte, error) {
	rs, err := manifest.Load(file, data)
	if err != nil {
		return nil, err
	}
	return manifest.EncodeYAML(rs...)
}

func readDefinitions(file string, data []byte) ([]byte, error) {
	ds, err := manifest.Definitions(file, data)
	if err != nil {
		return nil, err
	}
	return manifest.YAML(ds)
}

func readConfig(file string, data []byte) ([]byte, error) {
	c := config{Expect: 1, Servers: []string{"127.0.0.1"}}
	if err := manifest.DecodeConfig(file, data, &c); err != nil {
		return nil, err
	}
	return manifest.YAML(c)
}

// TestGolden runs every file of the archives through its reader. A file
// "x.want" holds what comes out of "x"; -update writes it.
func TestGolden(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		archive string
		read    func(string, []byte) ([]byte, error)
	}{
		{"resources.txtar", readResources},
		{"definitions.txtar", readDefinitions},
		{"config.txtar", readConfig},
	} {
		t.Run(tc.archive, func(t *testing.T) {
			t.Parallel()
			path := "testdata/" + tc.archive
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{}
			var inputs []txtar.File
			for _, f := range archive.Files {
				if name, ok := strings.CutSuffix(f.Name, ".want"); ok {
					want[name] = string(f.Data)
				} else {
					inputs = append(inputs, f)
				}
			}
			if len(inputs) == 0 {
				t.Fatal("the archive holds no case")
			}
			archive.Files = nil
			for _, f := range inputs {
				got := show(tc.read, f.Name, f.Data)
				archive.Files = append(archive.Files, f, txtar.File{Name: f.Name + ".want", Data: []byte(got)})
				if diff := cmp.Diff(want[f.Name], got); diff != "" && !*update {
					t.Errorf("%s (-want +got):\n%s", f.Name, diff)
				}
			}
			if *update {
				if err := os.WriteFile(path, txtar.Format(archive), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
