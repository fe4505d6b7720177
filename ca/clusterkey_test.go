package ca_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca"
)

func TestClusterKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cluster.key")
	key := ca.GenerateClusterKey()
	if err := ca.WriteClusterKey(path, key); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	back, err := ca.ReadClusterKey(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := key.ID()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := back.ID(); err != nil || got != want {
		t.Errorf("read key %s, %v; want %s", got, err, want)
	}
	if err := ca.WriteClusterKey(path, ca.GenerateClusterKey()); !errors.Is(err, ca.ErrClusterKey) || !errors.Is(err, fs.ErrExist) {
		t.Errorf("writing over a key: %v, want fs.ErrExist", err)
	}
	if still, err := ca.ReadClusterKey(path); err != nil || fmt.Sprint(still.ID()) != fmt.Sprint(want, nil) {
		t.Errorf("after the refused write: %v", err)
	}
	if err := ca.WriteClusterKey(filepath.Join(t.TempDir(), "x"), ca.ClusterKey{}); !errors.Is(err, ca.ErrClusterKey) {
		t.Errorf("writing no key: %v", err)
	}
	if err := ca.WriteClusterKey(filepath.Join(t.TempDir(), "no", "folder"), key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("writing into no folder: %v", err)
	}
}

func TestClusterKeyFileRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "good")
	if err := ca.WriteClusterKey(path, ca.GenerateClusterKey()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o620: false, 0o602: false, 0o777: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := ca.ReadClusterKey(path)
		if (err == nil) != ok || !ok && (!errors.Is(err, ca.ErrClusterKey) || !strings.Contains(err.Error(), "chmod 0600")) {
			t.Errorf("mode %04o: error %v, want accepted %v", mode, err, ok)
		}
	}
	changed := bytes.Clone(good)
	changed[20] = 'A' + (changed[20]-'A'+1)%26
	for name, text := range map[string][]byte{
		"empty": nil, "other text": []byte("hello\n"), "cut": good[:30], "changed": changed, "prefix alone": []byte("meshkey1."),
		"newer": append([]byte("meshkey2."), good[9:]...), "long": bytes.Repeat(good, 100),
	} {
		file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if key, err := ca.ReadClusterKey(file); !errors.Is(err, ca.ErrClusterKey) || !key.IsZero() {
			t.Errorf("%s: error %v, want ErrClusterKey", name, err)
		}
	}
	if _, err := ca.ReadClusterKey(dir); !errors.Is(err, ca.ErrClusterKey) {
		t.Errorf("a folder: %v", err)
	}
	if _, err := ca.ReadClusterKey(filepath.Join(dir, "none")); !errors.Is(err, ca.ErrClusterKey) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// The derivation is a contract: a later version that derived otherwise could not open what this one stored.
func TestClusterKeyDerivation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	// The bytes 0 to 31 and their checksum. All expected values were computed by another implementation of HKDF.
	const text = "meshkey1.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-pAnLQ"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := ca.ReadClusterKey(path)
	if err != nil {
		t.Fatal(err)
	}
	id, err := key.ID()
	if err != nil {
		t.Fatal(err)
	}
	one, err := key.Derive("admission")
	if err != nil {
		t.Fatal(err)
	}
	two, err := key.Derive("snapshots")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%s %x", id, one.Reveal()), "f9e82fa993a1397f 1efd6e668456ec10a65854bf278e3f6a02ed6c7a1a8274f04fc0b1e0e8c09b32"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if one.Equal(two) || len(two.Reveal()) != 32 {
		t.Error("two purposes share a subkey")
	}
}

func TestWrap(t *testing.T) {
	key := ca.GenerateClusterKey()
	for _, plain := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("secret"), 1000)} {
		wrapped, err := key.Wrap("root key", ca.NewSecret(plain))
		if err != nil {
			t.Fatal(err)
		}
		if len(plain) > 1 && bytes.Contains(wrapped, plain[:6]) {
			t.Error("the plain text is in it")
		}
		got, err := key.Unwrap("root key", wrapped)
		if err != nil || !bytes.Equal(got.Reveal(), plain) {
			t.Errorf("%d bytes came back as %d, %v", len(plain), len(got.Reveal()), err)
		}
	}
	secret := ca.NewSecret([]byte("secret"))
	one, err := key.Wrap("a", secret)
	if err != nil {
		t.Fatal(err)
	}
	two, err := key.Wrap("a", secret)
	if err != nil || bytes.Equal(one, two) {
		t.Errorf("the same secret is wrapped the same way twice, %v", err)
	}
	for i := range one {
		if _, err := key.Unwrap("a", flipped(one, uint16(i), 1)); !errors.Is(err, ca.ErrUnwrap) {
			t.Errorf("byte %d changed: %v, want ErrUnwrap", i, err)
		}
		if _, err := key.Unwrap("a", one[:i]); !errors.Is(err, ca.ErrUnwrap) {
			t.Errorf("cut to %d bytes: %v, want ErrUnwrap", i, err)
		}
	}
	if _, err := key.Unwrap("b", one); !errors.Is(err, ca.ErrUnwrap) {
		t.Errorf("another purpose: %v, want ErrUnwrap", err)
	}
	if _, err := ca.GenerateClusterKey().Unwrap("a", one); !errors.Is(err, ca.ErrUnwrap) || !strings.Contains(err.Error(), "under cluster key") {
		t.Errorf("another cluster key: %v, want ErrUnwrap and both keys' names", err)
	}
}

func TestZeroClusterKey(t *testing.T) {
	var zero ca.ClusterKey
	_, wrapErr := zero.Wrap("a", ca.NewSecret([]byte("x")))
	_, unwrapErr := zero.Unwrap("a", []byte("x"))
	_, deriveErr := zero.Derive("a")
	_, idErr := zero.ID()
	for name, err := range map[string]error{"wrap": wrapErr, "unwrap": unwrapErr, "derive": deriveErr, "id": idErr} {
		if !errors.Is(err, ca.ErrClusterKey) {
			t.Errorf("%s: %v, want ErrClusterKey", name, err)
		}
	}
}

func TestClusterKeyIsNeverPrinted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	key := ca.GenerateClusterKey()
	if err := ca.WriteClusterKey(path, key); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimSpace(strings.TrimPrefix(string(text), "meshkey1.")))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{"value": key, "pointer": &key, "struct": struct{ Key ca.ClusterKey }{key}, "hidden": struct{ key ca.ClusterKey }{key}} {
		for how, shown := range prints(t, v) {
			if leaks(shown, raw[:32]) {
				t.Errorf("%s printed as %s shows the key: %s", name, how, shown)
			}
		}
	}
}

func FuzzUnwrap(f *testing.F) {
	key := ca.GenerateClusterKey()
	wrapped, err := key.Wrap("a", ca.NewSecret([]byte("secret")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wrapped)
	f.Add(wrapped[:9])
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := key.Unwrap("a", data)
		if err == nil && (!bytes.Equal(data, wrapped) || string(got.Reveal()) != "secret") {
			t.Fatalf("%x was unwrapped", data)
		}
		if err != nil && !errors.Is(err, ca.ErrUnwrap) {
			t.Fatal(err)
		}
	})
}
