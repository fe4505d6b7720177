// Package canary looks for secrets where none may be: in logs, metrics, traces,
// cores, snapshots, and whatever else a program leaves behind. It knows them as they
// are, in hexadecimal, and in base64 at any place of a longer text.
package canary

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// minSecret is the shortest secret that is looked for: shorter ones are found
// everywhere.
const minSecret = 12

// Secret is what may not be found.
type Secret struct {
	Name  string
	Value []byte
}

// Find is where one was found, and in which form.
type Find struct {
	Path, Secret, Form string
	Offset             int64
}

// String tells it in a line, without the secret.
func (f Find) String() string {
	return fmt.Sprintf("%s holds %s (%s) at byte %d", f.Path, f.Secret, f.Form, f.Offset)
}

// PrivateKeys are the marks of private keys that nothing protects, whoever's they
// are: of PEM, and of PKCS #8 with an elliptic curve or Ed25519 (RFC 5958, 5915,
// 8410).
func PrivateKeys() []Secret {
	return []Secret{
		{"a private key", []byte("PRIVATE KEY-----")},
		{"an EC private key", []byte("\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04")},
		{"an Ed25519 private key", []byte("\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20")},
	}
}

// Searcher looks for a set of secrets. Use New; it may be used by several goroutines.
type Searcher struct {
	needles []needle
	longest int
}

type needle struct {
	secret, form string
	bytes        []byte
}

// New returns a Searcher. Space around a secret is not part of it.
func New(secrets ...Secret) (*Searcher, error) {
	s := &Searcher{}
	for _, secret := range secrets {
		value := bytes.TrimSpace(secret.Value)
		if len(value) < minSecret {
			return nil, fmt.Errorf("look for %s: %d bytes are too few to be told from chance", secret.Name, len(value))
		}
		s.add(secret.Name, "as it is", value)
		s.add(secret.Name, "hexadecimal", []byte(hex.EncodeToString(value)))
		s.add(secret.Name, "hexadecimal", []byte(strings.ToUpper(hex.EncodeToString(value))))
		for shift := range 3 {
			// What comes before and after shares characters with the ends.
			text := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), value...))
			text = text[(shift*8+5)/6 : len(text)-1]
			s.add(secret.Name, "base64", []byte(text))
			if url := strings.NewReplacer("+", "-", "/", "_").Replace(text); url != text {
				s.add(secret.Name, "base64 for URLs", []byte(url))
			}
		}
	}
	return s, nil
}

func (s *Searcher) add(secret, form string, b []byte) {
	s.needles = append(s.needles, needle{secret, form, b})
	s.longest = max(s.longest, len(b))
}

// chunk is how much is looked at in one go.
const chunk = 1 << 20

// Reader looks at all that r gives. Path is for the report.
func (s *Searcher) Reader(path string, r io.Reader) ([]Find, error) {
	var finds []Find
	zeros := make([]byte, chunk)
	buf := make([]byte, 0, s.longest+chunk)
	begin := int64(0) // of buf in what is read
	for {
		kept := len(buf)
		n, err := io.ReadFull(r, buf[kept:kept+chunk])
		buf = buf[:kept+n]
		if !bytes.Equal(buf[kept:], zeros[:n]) { // logs are allocated long before they are written
			for _, one := range s.needles {
				// A find that ends in what was kept was reported before.
				if at := bytes.Index(buf, one.bytes); at >= 0 && at+len(one.bytes) > kept {
					finds = append(finds, Find{path, one.secret, one.form, begin + int64(at)})
				}
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return finds, nil
		}
		if err != nil {
			return finds, fmt.Errorf("look for secrets in %s: %w", path, err)
		}
		keep := min(len(buf), s.longest-1)
		begin += int64(len(buf) - keep)
		buf = append(buf[:0], buf[len(buf)-keep:]...)
	}
}

// Tree looks at all files under a folder but those that may hold secrets. Names are
// looked at as well. Files that vanish meanwhile are none.
func (s *Searcher) Tree(root string, but func(path string) bool) ([]Find, error) {
	var finds []Find
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for secrets: %w", err)
		}
		if but(path) {
			return nil
		}
		named, err := s.Reader("the name "+path, strings.NewReader(d.Name()))
		finds = append(finds, named...)
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for secrets: %w", err)
		}
		defer f.Close() //nolint:errcheck // it is only read
		found, err := s.Reader(path, f)
		finds = append(finds, found...)
		return err
	})
	return finds, err //nolint:wrapcheck // of the function above
}
