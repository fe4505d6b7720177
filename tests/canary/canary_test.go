package canary_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshd/meshd/tests/canary"
)

var token = []byte("canary-token-0123456789-~~~???>>>") //nolint:gochecknoglobals // never changed

func searcher(t *testing.T) *canary.Searcher {
	t.Helper()
	s, err := canary.New(append(canary.PrivateKeys(), canary.Secret{Name: "the token", Value: append(token, '\n')})...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func keys(t *testing.T) (ec, ed []byte) {
	t.Helper()
	one, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if ec, err = x509.MarshalPKCS8PrivateKey(one); err != nil {
		t.Fatal(err)
	}
	if ed, err = x509.MarshalPKCS8PrivateKey(other); err != nil {
		t.Fatal(err)
	}
	return ec, ed
}

// Each secret is found in each form, wherever it lies in a file; what is none is not.
func TestForms(t *testing.T) {
	t.Parallel()
	ec, ed := keys(t)
	quoted, err := json.Marshal(map[string][]byte{"key": ec})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, text, want string
	}{
		{"nothing", "level=INFO msg=changed who=token:9f86d081 canary-token-0123", ""},
		{"as it is", "Authorization: Bearer " + string(token) + "\r\n", "as it is"},
		{"hexadecimal", "token=" + hex.EncodeToString(token), "hexadecimal"},
		{"upper case", strings.ToUpper(hex.EncodeToString(token)), "hexadecimal"},
		{"base64", base64.StdEncoding.EncodeToString(token), "base64"},
		{"base64, one byte on", base64.StdEncoding.EncodeToString([]byte("u:" + string(token) + "!")), "base64"},
		{"base64, two bytes on", base64.RawStdEncoding.EncodeToString([]byte("u" + string(token) + "!!")), "base64"},
		{"base64 for URLs", base64.URLEncoding.EncodeToString([]byte("user:" + string(token))), "base64 for URLs"},
		{"PEM", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ec})), "as it is"},
		{"DER", "\x00\x01" + string(ec), "as it is"},
		{"DER of Ed25519", string(ed), "as it is"},
		{"JSON", string(quoted), "base64"},
		{"a certificate", "-----BEGIN CERTIFICATE-----\nMIIB", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for _, before := range []int{0, 1, 1<<20 - 7, 1 << 20, 3<<20 + 5} {
				finds, err := searcher(t).Reader("log", bytes.NewReader(append(make([]byte, before), row.text...)))
				if err != nil {
					t.Fatal(err)
				}
				found := ""
				for _, f := range finds {
					if f.Form == row.want {
						found = f.Form
					}
				}
				if found != row.want || row.want == "" && len(finds) > 0 {
					t.Errorf("after %d bytes: %v", before, finds)
				}
			}
		})
	}
}

// A tree is searched, its names too, but for what may hold secrets.
func TestTree(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"a/server.log":                "started with " + string(token),
		"admin.token":                 string(token),
		"core." + string(token[0:12]): "",
		"b/" + hex.EncodeToString(token)[:60] + ".txt": "",
		"b/" + "x":          hex.EncodeToString(token),
		"b/wal/0000000.wal": strings.Repeat("\x00", 5<<20),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	finds, err := searcher(t).Tree(dir, func(path string) bool { return filepath.Base(path) == "admin.token" })
	if err != nil {
		t.Fatal(err)
	}
	if len(finds) != 2 || finds[0].Path != filepath.Join(dir, "a/server.log") || finds[0].Offset != 13 || finds[1].Path != filepath.Join(dir, "b/x") {
		t.Errorf("%v", finds)
	}
	if strings.Contains(finds[0].String(), string(token)) {
		t.Error("the report tells the secret")
	}
}

func TestTooShort(t *testing.T) {
	t.Parallel()
	if _, err := canary.New(canary.Secret{Name: "a word", Value: []byte("secret")}); err == nil {
		t.Error("a word is taken for a secret")
	}
}
