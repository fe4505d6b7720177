package ca

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// clusterKeyPrefix starts a cluster key file: the version, and what makes a key recognizable where it does not belong.
const clusterKeyPrefix = "meshkey1."

const (
	clusterKeyBytes    = 32
	clusterKeyIDBytes  = 8
	clusterKeyFileMax  = 1 << 10
	wrapVersion        = 1
	wrapOverhead       = 1 + clusterKeyIDBytes
	clusterKeyInfo     = "meshd cluster key v1 " // before every purpose, so that no other use of HKDF gives the same subkey
	clusterKeyPurposes = clusterKeyInfo + "derive "
	clusterKeyWraps    = clusterKeyInfo + "wrap "
	clusterKeyIDs      = clusterKeyInfo + "id"
)

var (
	// ErrClusterKey is wrapped by every error about a cluster key that can't be read, used or written.
	ErrClusterKey = errors.New("cluster key not usable")
	// ErrUnwrap is wrapped when wrapped bytes were changed, cut off, or wrapped for another purpose or under another key.
	ErrUnwrap = errors.New("can't unwrap")
)

// ClusterKey is the one secret that all servers of a cluster share outside of the store. Everything else is derived from it by
// purpose (HKDF-SHA256, RFC 5869), so that no two uses share key material. The zero ClusterKey refuses every use.
type ClusterKey struct {
	secret Secret
}

// GenerateClusterKey returns a new random key.
func GenerateClusterKey() ClusterKey {
	key := make([]byte, clusterKeyBytes)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the program instead
	return ClusterKey{secret: NewSecret(key)}
}

// ReadClusterKey reads a file that WriteClusterKey wrote. It refuses a file that anyone but its owner may touch. Errors wrap
// ErrClusterKey, and fs.ErrNotExist if there is no file.
func ReadClusterKey(path string) (ClusterKey, error) {
	file, err := os.Open(path) //nolint:gosec // the path is the operator's configuration
	if err != nil {
		return ClusterKey{}, fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return ClusterKey{}, fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	if !info.Mode().IsRegular() {
		return ClusterKey{}, fmt.Errorf("%w: %s is not a regular file", ErrClusterKey, path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return ClusterKey{}, fmt.Errorf("%w: %s has mode %04o, others can reach it: run chmod 0600 on it", ErrClusterKey, path, info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(file, clusterKeyFileMax))
	if err != nil {
		return ClusterKey{}, fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	key, err := parseClusterKey(string(text))
	if err != nil {
		return ClusterKey{}, fmt.Errorf("read %s: %w", path, err)
	}
	return key, nil
}

// WriteClusterKey writes key to a new file of mode 0600, and syncs it to disk. It never replaces a file: a lost cluster key is a
// lost CA. Errors wrap ErrClusterKey, and fs.ErrExist if the file is there.
func WriteClusterKey(path string, key ClusterKey) error {
	if key.secret.IsZero() {
		return fmt.Errorf("%w: it is empty", ErrClusterKey)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // the path is the operator's configuration
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %s is there already and is never replaced: %w", ErrClusterKey, path, err)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	_, err = file.WriteString(encodeClusterKey(key) + "\n")
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("%w: write %s: %w", ErrClusterKey, path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path) //nolint:gosec // the directory of the operator's configuration
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func encodeClusterKey(key ClusterKey) string {
	secret := key.secret.Reveal()
	return clusterKeyPrefix + base64.RawURLEncoding.EncodeToString(append(bytes.Clone(secret), clusterKeyChecksum(secret)...))
}

func parseClusterKey(text string) (ClusterKey, error) {
	encoded, ok := strings.CutPrefix(strings.TrimSpace(text), clusterKeyPrefix)
	if !ok {
		return ClusterKey{}, fmt.Errorf("%w: it does not start with %q", ErrClusterKey, clusterKeyPrefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(raw) != clusterKeyBytes+tokenChecksumBytes {
		return ClusterKey{}, fmt.Errorf("%w: it is cut off or damaged", ErrClusterKey)
	}
	if !bytes.Equal(raw[clusterKeyBytes:], clusterKeyChecksum(raw[:clusterKeyBytes])) {
		return ClusterKey{}, fmt.Errorf("%w: its checksum is wrong, a character was changed", ErrClusterKey)
	}
	return ClusterKey{secret: NewSecret(raw[:clusterKeyBytes:clusterKeyBytes])}, nil
}

func clusterKeyChecksum(secret []byte) []byte {
	sum := sha256.Sum256(append([]byte(clusterKeyPrefix), secret...))
	return sum[:tokenChecksumBytes]
}

// IsZero reports whether the key is missing.
func (k ClusterKey) IsZero() bool { return k.secret.IsZero() }

// ID returns a name for the key that reveals nothing about it, by which two servers see that theirs differ.
func (k ClusterKey) ID() (string, error) {
	id, err := k.id()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", id), nil
}

func (k ClusterKey) id() ([]byte, error) { return k.expand(clusterKeyIDs, clusterKeyIDBytes) }

// Derive returns the 32-byte subkey for one purpose. The same key and purpose always give the same subkey.
func (k ClusterKey) Derive(purpose string) (Secret, error) {
	subkey, err := k.expand(clusterKeyPurposes+purpose, clusterKeyBytes)
	if err != nil {
		return Secret{}, err
	}
	return NewSecret(subkey), nil
}

func (k ClusterKey) expand(info string, length int) ([]byte, error) {
	if k.secret.IsZero() {
		return nil, fmt.Errorf("%w: it is empty", ErrClusterKey)
	}
	out, err := hkdf.Key(sha256.New, k.secret.Reveal(), nil, info, length)
	if err != nil {
		return nil, fmt.Errorf("%w: derive %q: %w", ErrClusterKey, info, err)
	}
	return out, nil
}

// Wrap encrypts secret with AES-256-GCM under the subkey of purpose, which Unwrap must be given again. The result names the
// cluster key by its ID and may be stored anywhere. Each purpose is good for 2^32 calls (NIST SP 800-38D, section 8.3).
func (k ClusterKey) Wrap(purpose string, secret Secret) ([]byte, error) {
	id, err := k.id()
	if err != nil {
		return nil, err
	}
	gcm, err := k.cipher(purpose)
	if err != nil {
		return nil, err
	}
	header := append([]byte{wrapVersion}, id...)
	return gcm.Seal(bytes.Clone(header), nil, secret.Reveal(), wrapData(header, purpose)), nil //nolint:gosec // the nonce is random and made inside
}

// Unwrap decrypts what Wrap returned for the same purpose. Errors wrap ErrUnwrap.
func (k ClusterKey) Unwrap(purpose string, wrapped []byte) (Secret, error) {
	id, err := k.id()
	if err != nil {
		return Secret{}, err
	}
	if len(wrapped) < wrapOverhead || wrapped[0] != wrapVersion {
		return Secret{}, fmt.Errorf("%w %s: not in a form that this version knows", ErrUnwrap, purpose)
	}
	header := wrapped[:wrapOverhead:wrapOverhead]
	if !bytes.Equal(header[1:], id) {
		return Secret{}, fmt.Errorf("%w %s: it was wrapped under cluster key %x, this one is %x", ErrUnwrap, purpose, header[1:], id)
	}
	gcm, err := k.cipher(purpose)
	if err != nil {
		return Secret{}, err
	}
	plain, err := gcm.Open(nil, nil, wrapped[wrapOverhead:], wrapData(header, purpose))
	if err != nil {
		return Secret{}, fmt.Errorf("%w %s: it was changed, or wrapped for another purpose", ErrUnwrap, purpose)
	}
	return NewSecret(plain), nil
}

func wrapData(header []byte, purpose string) []byte { return append(bytes.Clone(header), purpose...) }

func (k ClusterKey) cipher(purpose string) (cipher.AEAD, error) {
	subkey, err := k.expand(clusterKeyWraps+purpose, clusterKeyBytes)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(subkey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClusterKey, err)
	}
	return gcm, nil
}
