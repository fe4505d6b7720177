package proxy

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

const (
	// serverNameSuffix ends every server name of the mesh.
	serverNameSuffix = ".mesh"
	// hashedPrefix marks a label that is the hash of a name. "--" at the third position is reserved by RFC 5891, section
	// 4.2.3.1, and this is no prefix that anybody registered; a name that has it all the same is hashed too, so that a label
	// says by itself whether it is a name or a hash.
	hashedPrefix = "h---"
	// maxLabel and maxServerName are the bounds of a DNS name in text form (RFC 1035, section 2.3.4).
	maxLabel      = 63
	maxServerName = 253
)

// ErrServerName is wrapped by every error about a name that ServerName never returns.
var ErrServerName = errors.New("no server name of the mesh")

// hashEncoding gives 52 lower-case letters and digits for a SHA-256.
var hashEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding) //nolint:gochecknoglobals // a constant

// hashedLength is the length of every hashed label.
const hashedLength = len(hashedPrefix) + 52

// Target is what a server name picks: one port of one instance. A label that starts with "h---" stands for a name that is no
// DNS label; only its hash is known.
type Target struct {
	Port, Instance, Service, Namespace string
}

// ServerName returns the name by which the mesh reaches one port of one instance: the TLS server name (SNI) that the proxy
// before it dispatches by. It has the form <port>.<instance>.<service>.<namespace>.mesh, in lower case, at most 253 bytes.
// A part that is no lower-case DNS label of at most 63 bytes is replaced by a hash of it (SHA-256), and so are the longest
// parts where the whole would be too long. Different arguments give different names.
func ServerName(port, instance, service, namespace string) string {
	labels := [4]string{port, instance, service, namespace}
	length := len(serverNameSuffix) + len(labels) - 1
	for i, label := range labels {
		if !isLabel(label) || strings.HasPrefix(label, hashedPrefix) {
			labels[i] = hashLabel(label)
		}
		length += len(labels[i])
	}
	for length > maxServerName {
		longest := 0
		for i := range labels {
			if len(labels[i]) > len(labels[longest]) {
				longest = i
			}
		}
		hashed := hashLabel(labels[longest])
		length -= len(labels[longest]) - len(hashed)
		labels[longest] = hashed
	}
	return strings.Join(labels[:], ".") + serverNameSuffix
}

// ParseServerName takes a server name apart, for diagnosis. It accepts only what ServerName can have returned; errors wrap
// ErrServerName. It never allocates for a name that is refused for its length.
func ParseServerName(name string) (Target, error) {
	if len(name) > maxServerName {
		return Target{}, fmt.Errorf("%w: %d bytes long, at most %d are allowed", ErrServerName, len(name), maxServerName)
	}
	rest, ok := strings.CutSuffix(name, serverNameSuffix)
	if !ok {
		return Target{}, fmt.Errorf("%w: %q does not end with %q", ErrServerName, name, serverNameSuffix)
	}
	labels := strings.Split(rest, ".")
	if len(labels) != 4 {
		return Target{}, fmt.Errorf("%w: %q is not <port>.<instance>.<service>.<namespace>%s", ErrServerName, name, serverNameSuffix)
	}
	for _, label := range labels {
		if !isLabel(label) || strings.HasPrefix(label, hashedPrefix) && !isHashed(label) {
			return Target{}, fmt.Errorf("%w: %q in %q is no lower-case DNS label", ErrServerName, label, name)
		}
	}
	return Target{Port: labels[0], Instance: labels[1], Service: labels[2], Namespace: labels[3]}, nil
}

func hashLabel(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hashedPrefix + hashEncoding.EncodeToString(sum[:])
}

func isHashed(label string) bool {
	digits, ok := strings.CutPrefix(label, hashedPrefix)
	if !ok || len(label) != hashedLength {
		return false
	}
	_, err := hashEncoding.DecodeString(digits)
	return err == nil
}

// isLabel reports whether s is a lower-case label of RFC 1123, section 2.1.
func isLabel(s string) bool {
	if s == "" || len(s) > maxLabel || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
