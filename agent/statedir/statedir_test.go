package statedir_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/agent/statedir"
)

func open(t *testing.T) statedir.Dir {
	t.Helper()
	d, err := statedir.Open(filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestWriteThenRead(t *testing.T) {
	t.Parallel()
	d := open(t)
	for _, content := range []string{"", "one", "two\nlines\n"} {
		if err := d.Write("f.json", []byte(content)); err != nil {
			t.Fatal(err)
		}
		got, err := d.Read("f.json")
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != content {
			t.Errorf("read %q, want %q", got, content)
		}
	}
	info, err := os.Stat(d.Path("f.json"))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
	names, err := d.Names(".json")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"f.json"}, names); diff != "" {
		t.Errorf("no temporary file may stay behind: %s", diff)
	}
	for range 2 {
		if err := d.Remove("f.json"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Read("f.json"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Remove: %v, want fs.ErrNotExist", err)
	}
}

func TestEveryBitFlipIsSeen(t *testing.T) {
	t.Parallel()
	d := open(t)
	if err := d.Write("f", []byte("state")); err != nil {
		t.Fatal(err)
	}
	sealed, err := os.ReadFile(d.Path("f"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range sealed {
		for bit := range 8 {
			damaged := append([]byte(nil), sealed...)
			damaged[i] ^= 1 << bit
			if data, err := statedir.Unseal(damaged); !errors.Is(err, statedir.ErrCorrupt) {
				t.Fatalf("byte %d bit %d flipped: got %q, %v", i, bit, data, err)
			}
		}
	}
	for i := range sealed {
		if data, err := statedir.Unseal(sealed[:i]); !errors.Is(err, statedir.ErrCorrupt) {
			t.Fatalf("cut at %d: got %q, %v", i, data, err)
		}
	}
}

func TestOpenStateIsRefused(t *testing.T) {
	t.Parallel()
	wide := filepath.Join(t.TempDir(), "wide")
	if err := os.Mkdir(wide, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(wide, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := statedir.Open(wide); !errors.Is(err, statedir.ErrTooOpen) {
		t.Errorf("a directory of mode 0750: %v, want ErrTooOpen", err)
	}
	d := open(t)
	if err := d.Write("key", []byte("secret")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(d.Path("key"), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Read("key"); !errors.Is(err, statedir.ErrTooOpen) {
		t.Errorf("a file of mode 0640: %v, want ErrTooOpen", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := statedir.Open(file); err == nil {
		t.Error("a file was opened as a directory")
	}
}

func FuzzUnseal(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte("meshd-sha256:"))
	f.Add([]byte("meshd-sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"))
	f.Fuzz(func(t *testing.T, sealed []byte) {
		data, err := statedir.Unseal(sealed)
		if err != nil && !errors.Is(err, statedir.ErrCorrupt) {
			t.Fatalf("unexpected error %v", err)
		}
		if err != nil && data != nil {
			t.Fatal("data came with an error")
		}
	})
}
