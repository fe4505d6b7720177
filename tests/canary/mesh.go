package canary

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshd/meshd/ca"
)

// Mesh is the machines of a mesh after a test, each with a folder of its own.
type Mesh struct {
	// Folders are searched: those of the machines, or what lies above them.
	Folders []string
	// Inputs are the names of files that hold a secret because the operator put them
	// there, each with what it is. The secrets are read from there and looked for
	// everywhere else.
	Inputs map[string]string
	// Secrets are those that lie in no file.
	Secrets []Secret
	// KeepsKeys tells which files may hold private keys that nothing protects. Nil is
	// none.
	KeepsKeys func(path string) bool
}

// Inputs are those of most machines.
func Inputs() map[string]string {
	return map[string]string{"bootstrap.token": "the operator's token", "cluster.key": "the cluster's key", "join.token": "a join token"}
}

// Sweep looks for all secrets, and for private keys, in all files of all folders.
// It also gives back the two searchers, for what is in no file.
func (m Mesh) Sweep() ([]Find, []*Searcher, error) {
	given, err := m.given()
	if err != nil {
		return nil, nil, err
	}
	all := append(given, m.Secrets...)
	for _, s := range all {
		all = append(all, inner(s)...)
	}
	tokens, err := New(all...)
	if err != nil {
		return nil, nil, err
	}
	keys, err := New(PrivateKeys()...)
	if err != nil {
		return nil, nil, err
	}
	isInput := func(path string) bool { return m.Inputs[filepath.Base(path)] != "" }
	var finds []Find
	for _, folder := range m.Folders {
		found, err1 := tokens.Tree(folder, isInput)
		more, err2 := keys.Tree(folder, func(path string) bool { return isInput(path) || m.KeepsKeys != nil && m.KeepsKeys(path) })
		if err := errors.Join(err1, err2); err != nil {
			return nil, nil, err
		}
		finds = append(append(finds, found...), more...)
	}
	return finds, []*Searcher{tokens, keys}, nil
}

// given reads what the operator has given to the machines.
func (m Mesh) given() ([]Secret, error) {
	var out []Secret
	seen := map[string]bool{}
	for _, folder := range m.Folders {
		err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
			name := m.Inputs[filepath.Base(path)]
			if err != nil || name == "" || !d.Type().IsRegular() {
				return gone(err)
			}
			f, err := os.Open(path)
			if err != nil {
				return gone(err)
			}
			defer f.Close() //nolint:errcheck // it is only read
			text, err := io.ReadAll(f)
			if err == nil && len(text) > 0 && !seen[string(text)] {
				seen[string(text)] = true
				out = append(out, Secret{Name: name, Value: text})
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("read the secrets that the operator has given: %w", err)
		}
	}
	return out, nil
}

// gone passes over files that vanish meanwhile.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// inner returns what a secret carries in another form: the bytes of a cluster's key,
// the secret of a join token.
func inner(s Secret) []Secret {
	text := strings.TrimSpace(string(s.Value))
	if encoded, is := strings.CutPrefix(text, "meshkey1."); is {
		if raw, err := base64.RawURLEncoding.DecodeString(encoded); err == nil && len(raw) > 32 {
			return []Secret{{Name: s.Name, Value: raw[:32]}} // a checksum follows
		}
	}
	if token, err := ca.ParseJoinToken(text); err == nil {
		return []Secret{{Name: "the secret of " + s.Name, Value: token.Secret.Reveal()}}
	}
	return nil
}
