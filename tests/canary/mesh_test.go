package canary_test

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/tests/canary"
)

// What the operator gave to one machine is found on every other, also what it carries
// within; the files themselves, and keys where they belong, are not.
func TestMesh(t *testing.T) {
	t.Parallel()
	key := filepath.Join(t.TempDir(), "cluster.key")
	if err := ca.WriteClusterKey(key, ca.GenerateClusterKey()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	encoded := strings.TrimPrefix(strings.TrimSpace(string(text)), "meshkey1.")
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	join, err := ca.JoinToken{Servers: []string{"10.0.0.1:7400"}, Roots: [32]byte{1}, Secret: ca.NewSecret([]byte("0123456789abcdef0123456789abcdef"))}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, path, content, want string }{
		{name: "nothing", path: "vm/agent.log", content: "level=INFO msg=joined"},
		{name: "a token of the operator", path: "vm/agent.log", content: "token=" + string(token), want: "the operator's token"},
		{name: "the key as bytes", path: "vm/core", content: "\x00" + string(raw[:32]), want: "the cluster's key"},
		{name: "a join token that lies in no file", path: "vm/proxy.log", content: join, want: "a join token"},
		{name: "the secret of that", path: "srv/server.log", content: "0123456789abcdef0123456789abcdef", want: "the secret of a join token"},
		{name: "a private key", path: "srv/data/key.pem", content: "-----BEGIN PRIVATE KEY-----", want: "a private key"},
		{name: "a private key where it belongs", path: "vm/agent/key.pem", content: "-----BEGIN PRIVATE KEY-----"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for name, content := range map[string]string{"srv/bootstrap.token": string(token) + "\n", "srv/cluster.key": string(text), row.path: row.content} {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			finds, searchers, err := canary.Mesh{
				Folders: []string{filepath.Join(dir, "srv"), filepath.Join(dir, "vm")}, Inputs: canary.Inputs(),
				Secrets:   []canary.Secret{{Name: "a join token", Value: []byte(join)}},
				KeepsKeys: func(path string) bool { return strings.Contains(path, "/agent/") },
			}.Sweep()
			if err != nil {
				t.Fatal(err)
			}
			found := ""
			for _, f := range finds {
				if f.Secret == row.want && f.Path == filepath.Join(dir, row.path) {
					found = f.Secret
				}
			}
			if found != row.want || row.want == "" && len(finds) > 0 {
				t.Errorf("%v", finds)
			}
			again := 0
			for _, s := range searchers {
				finds, err := s.Reader("metrics", strings.NewReader(row.content))
				if err != nil {
					t.Fatal(err)
				}
				again += len(finds)
			}
			if row.want != "" && again == 0 {
				t.Error("the searchers do not find it")
			}
		})
	}
}
