package catalog

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// A Namespace is a scope of service names. Namespaces are created, never
// implied: a name in a namespace that does not exist is refused.
type Namespace struct {
	Name string `json:"name"`
}

// Validate reports every problem of the spec; see FieldErrors.
func (n Namespace) Validate() error {
	var p Problems
	p.label("name", n.Name)
	return p.Err()
}

// A Node is a host (or container) with an agent: the user's word on what it may
// do. The zero value may run nothing.
type Node struct {
	Name string `json:"name"`
	// Services are the patterns of what this node may register, receive
	// traffic for and get certificates of: "web" (in the default namespace),
	// "ns/web", "ns/*" or "*". None means none.
	Services []string `json:"services,omitempty"`
	// Labels are the operator's own, for selection and display.
	Labels map[string]string `json:"labels,omitempty"`
}

// MayRun reports whether a pattern of the node covers the service. A malformed
// pattern covers nothing.
func (n Node) MayRun(service Name) bool {
	return slices.ContainsFunc(n.Services, func(pattern string) bool { return Covers(pattern, service) })
}

// Covers reports whether a node's pattern covers the service. A malformed
// pattern covers nothing, and nothing covers a malformed service.
func Covers(pattern string, service Name) bool {
	if CheckPattern(pattern) != nil || CheckLabel(service.Namespace) != nil || CheckLabel(service.Name) != nil {
		return false
	}
	if pattern == "*" {
		return true
	}
	ns, name, ok := strings.Cut(pattern, "/")
	if !ok {
		ns, name = DefaultNamespace, pattern
	}
	return ns == service.Namespace && (name == "*" || name == service.Name)
}

// CheckPattern reports why s is not a pattern of services: "web", "ns/web",
// "ns/*" or "*".
func CheckPattern(s string) error {
	if s == "*" {
		return nil
	}
	if ns, name, ok := strings.Cut(s, "/"); ok && name == "*" {
		if err := CheckLabel(ns); err != nil {
			return fmt.Errorf("%q: namespace: %w; write \"ns/*\", or \"*\" for every service", s, err)
		}
		return nil
	}
	if _, err := ParseName(s); err != nil {
		return fmt.Errorf("%w; write \"service\", \"ns/service\", \"ns/*\" or \"*\"", err)
	}
	return nil
}

// Validate reports every problem of the spec; see FieldErrors.
func (n Node) Validate() error {
	var p Problems
	p.label("name", n.Name)
	for i, s := range n.Services {
		at := fmt.Sprintf("services[%d]", i)
		if err := CheckPattern(s); err != nil {
			p.Add(at, "%v", err)
		} else if slices.Contains(n.Services[:i], s) {
			p.Add(at, "%q is listed twice: remove one", s)
		}
	}
	p.meta("labels", n.Labels)
	return p.Err()
}

// A Lease is the servers' record of the stream over which a node's agent is
// connected, under its own key, written only when the node connects, moves to
// another server or is lost.
type Lease struct {
	// Server and Session name the stream; Epoch grows with each new one.
	Server  string `json:"server"`
	Session string `json:"session"`
	Epoch   uint64 `json:"epoch"`
	// Lost says that the lease ran out: the node is stale, and its instances
	// are used only while nothing better exists.
	Lost  bool      `json:"lost,omitzero"`
	Since time.Time `json:"since"`
}

// A NodeStatus is what a node's agent reported of itself.
type NodeStatus struct {
	Address string `json:"address"`
	Version string `json:"version"`
	// FeatureLevel is the agent's catalog.FeatureLevel.
	FeatureLevel int       `json:"feature_level"`
	Joined       time.Time `json:"joined"`
}

// Limits of free-form metadata; Consul's figures, so that imports fit.
const (
	maxMetaPairs = 64
	maxMetaKey   = 128
	maxMetaValue = 512
)

// meta records the problems of a map of metadata at path.
func (p *Problems) meta(path string, m map[string]string) {
	if len(m) > maxMetaPairs {
		p.Add(path, "%d pairs, at most %d are allowed", len(m), maxMetaPairs)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		at := path + "." + k
		switch {
		case k == "" || len(k) > maxMetaKey || strings.Trim(k, metaKeyBytes) != "":
			p.Add(path, "key %q: use 1 to %d of A-Z, a-z, 0-9, \"-\", \"_\" and \".\"", k, maxMetaKey)
		case len(m[k]) > maxMetaValue:
			p.Add(at, "%d bytes, at most %d are allowed", len(m[k]), maxMetaValue)
		case !printable(m[k]):
			p.Add(at, "control characters and invalid UTF-8 are not allowed: remove them")
		}
	}
}

const metaKeyBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
