package fault_test

import (
	"encoding/base64"
	"os"
	"strings"
	"testing"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestSweep plants each secret of a cluster where none may be, and wants the sweep
// that follows every test to find it.
func TestSweep(t *testing.T) {
	c := cluster.New(t, cluster.Plan{})
	s := c.Servers[0]
	if finds := c.Sweep(); len(finds) > 0 {
		t.Fatalf("nothing was planted, and this is found: %v", finds)
	}
	key, err := os.ReadFile(s.Path("cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"planted.log":        "who=" + cluster.AdminToken,
		"data/planted.pem":   "-----BEGIN PRIVATE KEY-----\n",
		"data/planted.txt":   "key=" + strings.TrimSpace(string(key)),
		"data/store/planted": base64.StdEncoding.EncodeToString([]byte("?" + cluster.AdminToken)),
	} {
		path := s.Write(content, 0o600, name)
		if finds := c.Sweep(); len(finds) == 0 || finds[0].Path != path {
			t.Errorf("%s: %v", name, finds)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}
