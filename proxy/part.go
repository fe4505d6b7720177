package proxy

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
)

// ErrPart is wrapped by every error about parts that make no plan.
var ErrPart = errors.New("parts make no plan")

// A PartKind tells what a Part holds.
type PartKind string

// The kinds of part.
const (
	PartPlan     PartKind = "plan"   // position, trust domain, access log, limits; exactly one, without a name
	PartBundle   PartKind = "bundle" // the roots; exactly one, without a name
	PartListener PartKind = "listener"
	PartInbound  PartKind = "inbound"
	PartCluster  PartKind = "cluster"
	PartPolicy   PartKind = "policy"
)

// Part is one independently replaceable piece of a Config: the unit in which changes travel and are stored.
type Part struct {
	Kind PartKind `json:"kind"`
	// Name is unique within the kind.
	Name string `json:"name,omitempty"`
	// Hash is HashPart of the other fields.
	Hash string          `json:"hash"`
	JSON json.RawMessage `json:"json"`
}

// Key returns the part's place in a plan: kind and name.
func (p Part) Key() string { return string(p.Kind) + "/" + p.Name }

// HashPart returns what Part.Hash must be: a SHA-256 over kind, name and bytes, in unpadded base64url.
func HashPart(kind PartKind, name string, data []byte) string {
	sum := sha256.New()
	for _, field := range [][]byte{[]byte(kind), []byte(name), data} {
		sum.Write(append(strconv.AppendInt(nil, int64(len(field)), 10), ':'))
		sum.Write(field)
	}
	return base64.RawURLEncoding.EncodeToString(sum.Sum(nil))
}

// planPart is the content of the part of kind PartPlan: what belongs to the plan as a whole.
type planPart struct {
	Position    catalog.Position `json:"position"`
	TrustDomain string           `json:"trust_domain"`
	Zone        string           `json:"zone,omitempty"`
	AccessLog   string           `json:"access_log,omitempty"`
	Limits      Limits           `json:"limits,omitzero"`
}

// Split cuts a plan into parts, sorted by key. The same plan gives the same bytes and hashes in every process, whatever the
// order of its lists. It does not check the plan; an error means that a value can't be written as JSON, or that two entries
// of one kind share a name.
func Split(c Config) ([]Part, error) {
	parts := make([]Part, 0, 2+len(c.Listeners)+len(c.Inbounds)+len(c.Clusters)+len(c.Policies))
	var errs []error
	add := func(kind PartKind, name string, value any) {
		data, err := json.Marshal(value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%w: write %s %q: %w", ErrPart, kind, name, err))
			return
		}
		parts = append(parts, Part{Kind: kind, Name: name, Hash: HashPart(kind, name, data), JSON: data})
	}
	add(PartPlan, "", planPart{Position: c.Position, TrustDomain: c.TrustDomain, Zone: c.Zone, AccessLog: c.AccessLog, Limits: c.Limits})
	add(PartBundle, "", c.Bundle)
	for _, l := range c.Listeners {
		add(PartListener, l.Name, l)
	}
	for _, in := range c.Inbounds {
		add(PartInbound, in.ServerName, in)
	}
	for _, cl := range c.Clusters {
		cl.Endpoints = slices.SortedFunc(slices.Values(cl.Endpoints), func(a, b Endpoint) int {
			return cmp.Or(cmp.Compare(a.Instance, b.Instance), cmp.Compare(a.ServerName, b.ServerName), cmp.Compare(a.Address, b.Address))
		})
		add(PartCluster, cl.Name, cl)
	}
	for _, p := range c.Policies {
		add(PartPolicy, p.Service.String(), p)
	}
	SortParts(parts)
	for i := 1; i < len(parts); i++ {
		if parts[i].Key() == parts[i-1].Key() {
			errs = append(errs, fmt.Errorf("%w: two parts are called %q", ErrPart, parts[i].Key()))
		}
	}
	return parts, errors.Join(errs...)
}

// SortParts sorts parts by key, the order in which Split returns them.
func SortParts(parts []Part) {
	slices.SortFunc(parts, func(a, b Part) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), strings.Compare(a.Name, b.Name))
	})
}

// Assemble puts a plan together. Its lists come out sorted by name. It refuses parts whose hash, kind or name is wrong, that
// are there twice, or that can't be read; the bytes may come from anywhere. Unknown members are ignored, so that a newer agent
// can feed an older proxy, with one exception: a policy with a member unknown here may deny more than can be understood, so it
// becomes one that denies everything (see Policy.Unreadable). Errors wrap ErrPart. Call Validate on the result.
func Assemble(parts []Part) (Config, error) {
	var c Config
	parts = slices.Clone(parts)
	SortParts(parts)
	var errs []error
	seen := map[PartKind]int{}
	for i, p := range parts {
		seen[p.Kind]++
		if i > 0 && p.Key() == parts[i-1].Key() {
			errs = append(errs, fmt.Errorf("%w: two parts are called %q", ErrPart, p.Key()))
			continue
		}
		if want := HashPart(p.Kind, p.Name, p.JSON); p.Hash != want {
			errs = append(errs, fmt.Errorf("%w: part %q has hash %q, its bytes have %q", ErrPart, p.Key(), p.Hash, want))
			continue
		}
		if err := c.add(p); err != nil {
			errs = append(errs, err)
		}
	}
	for _, kind := range []PartKind{PartPlan, PartBundle} {
		if seen[kind] != 1 {
			errs = append(errs, fmt.Errorf("%w: %d parts of kind %q, want one", ErrPart, seen[kind], kind))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Config{}, err
	}
	return c, nil
}

// add reads one part into the plan.
func (c *Config) add(p Part) error {
	switch p.Kind {
	case PartPlan:
		var head planPart
		err := decode(p, &head, func() string { return "" })
		c.Position, c.TrustDomain, c.Zone, c.AccessLog = head.Position, head.TrustDomain, head.Zone, head.AccessLog
		c.Limits = head.Limits
		return err
	case PartBundle:
		var b ca.Bundle
		err := decode(p, &b, func() string { return "" })
		c.Bundle = b
		return err
	case PartListener:
		var l Listener
		err := decode(p, &l, func() string { return l.Name })
		c.Listeners = append(c.Listeners, l)
		return err
	case PartInbound:
		var in Inbound
		err := decode(p, &in, func() string { return in.ServerName })
		c.Inbounds = append(c.Inbounds, in)
		return err
	case PartCluster:
		var cl Cluster
		err := decode(p, &cl, func() string { return cl.Name })
		c.Clusters = append(c.Clusters, cl)
		return err
	case PartPolicy:
		pol, err := decodePolicy(p)
		c.Policies = append(c.Policies, pol)
		return err
	default:
		return fmt.Errorf("%w: part %q is of an unknown kind; this proxy may be older than its agent", ErrPart, p.Key())
	}
}

// decode reads a part's bytes and holds its name against theirs.
func decode(p Part, into any, name func() string) error {
	if err := json.Unmarshal(p.JSON, into); err != nil {
		return fmt.Errorf("%w: read part %q: %w", ErrPart, p.Key(), err)
	}
	if got := name(); got != p.Name {
		return fmt.Errorf("%w: part %q holds one that is called %q", ErrPart, p.Key(), got)
	}
	return nil
}

func decodePolicy(p Part) (Policy, error) {
	var pol Policy
	if err := decode(p, &pol, func() string { return pol.Service.String() }); err != nil {
		return Policy{}, err
	}
	strict := json.NewDecoder(bytes.NewReader(p.JSON))
	strict.DisallowUnknownFields()
	var again Policy
	if err := strict.Decode(&again); err != nil {
		return Policy{Service: pol.Service, Unreadable: err.Error()}, nil //nolint:nilerr // it is kept in the policy, which denies
	}
	return pol, nil
}

// Diff tells how to make the plan before into the plan after: the parts to put in place, and the keys of those to drop, both
// sorted. It compares hashes, not bytes.
func Diff(before, after []Part) (put []Part, drop []string) {
	known := make(map[string]string, len(before))
	for _, p := range before {
		known[p.Key()] = p.Hash
	}
	return DiffHashes(known, after)
}

// DiffHashes is Diff for a side that knows only the hashes, by key, of what the other has.
func DiffHashes(known map[string]string, after []Part) (put []Part, drop []string) {
	wanted := make(map[string]struct{}, len(after))
	for _, p := range after {
		wanted[p.Key()] = struct{}{}
		if known[p.Key()] != p.Hash {
			put = append(put, p)
		}
	}
	for key := range known {
		if _, ok := wanted[key]; !ok {
			drop = append(drop, key)
		}
	}
	SortParts(put)
	slices.Sort(drop)
	return put, drop
}
