// Package acl decides who may do what on the servers. There is one function for
// every route, HTTP or gRPC: [Authorize]. What a token may do say its policies,
// which a [Book] holds compiled. The package also has the records of tokens, of
// which only a hash is ever stored.
package acl

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshd/meshd/catalog"
)

var (
	// ErrUnauthenticated is wrapped when nobody in particular asked for what
	// needs somebody: another try with credentials may succeed.
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrDenied is wrapped when the caller is known and may not do this.
	ErrDenied = errors.New("permission denied")
)

// Subject is the kind of caller. The zero Subject is Anonymous.
type Subject uint8

// The subjects.
const (
	// Anonymous presented nothing.
	Anonymous Subject = iota
	// Bearer presented a token.
	Bearer
	// Host presented a node certificate.
	Host
	// Local is connected to the server's own unix socket as its user or as root.
	Local
)

// String returns the subject's name in messages.
func (s Subject) String() string {
	switch s {
	case Anonymous:
		return "anonymous"
	case Bearer:
		return "token"
	case Host:
		return "node"
	case Local:
		return "local"
	default:
		return "unknown"
	}
}

// Identity is an authenticated caller. The zero Identity is anonymous.
type Identity struct {
	Subject Subject
	// Name is the token's accessor, the node's name, or the local user's.
	Name string
	// Rights are those of a token; nil: none. Local callers have all, whatever it says.
	Rights *Rights
	// Title is what people call the caller, such as the description of the token;
	// it proves nothing.
	Title string
	// Expires is when the token ends; zero: it does not.
	Expires time.Time
}

// String names the caller in messages and in the audit trail; it holds no secret.
func (i Identity) String() string {
	if i.Name == "" {
		return i.Subject.String()
	}
	return i.Subject.String() + ":" + i.Name
}

// Describe names the caller for people: a token by what they call it, too.
func (i Identity) Describe() string {
	switch {
	case i.Subject == Bearer && i.Title != "":
		return fmt.Sprintf("token %s (accessor %s)", i.Title, i.Name)
	case i.Subject == Bearer:
		return "token " + i.Name
	default:
		return i.String()
	}
}

// Verb is what is done to a resource.
type Verb string

// The verbs.
const (
	Read Verb = catalog.VerbRead
	// Write includes Read: who writes is told what was before.
	Write Verb = catalog.VerbWrite
	// Tap is to see single requests to a service: who sends them, and their paths.
	Tap Verb = catalog.VerbTap
)

// Resource is what a request is about. Most are kinds of records; the others name
// what a server does.
type Resource string

// The resources. One that is not listed may be reached by an admin only, so that a
// route with a mistyped resource is closed rather than open.
const (
	Health     Resource = "health"   // is the server up
	Roots      Resource = "ca-roots" // the public roots
	Join       Resource = "join"     // trade a join token for a node certificate
	Namespace  Resource = "namespace"
	Node       Resource = "node"
	Service    Resource = "service"
	Instance   Resource = "instance"
	Intention  Resource = "intention"
	Set        Resource = "set"
	Tokens     Resource = "token"
	JoinTokens Resource = "join_token"
	Authority  Resource = "ca"
	Operator   Resource = "operator" // the cluster itself: its members, leases held back
	Snapshot   Resource = "snapshot" // the whole state, with all that is secret in it
	Audit      Resource = "audit"    // who did what
	Policies   Resource = "policy"
	Roles      Resource = "role"
	Proxy      Resource = "proxy" // what proxies run, and what they see
	// Each is for routes whose handlers authorize each thing that they come to, and
	// Self for what callers ask about themselves: open to all but the anonymous.
	Each Resource = "each"
	Self Resource = "self"

	// The calls of an agent about its own node.
	Sync     Resource = "sync"
	Register Resource = "register"
	Sign     Resource = "sign"
	Leave    Resource = "leave"
	Watch    Resource = "watch"
)

// Request is one thing that a caller wants to do.
type Request struct {
	Verb     Verb
	Resource Resource
	// Namespace and Name tell which one. Empty means all of them; for an agent's
	// own calls Name is the node.
	Namespace, Name string
	// SourceNamespace and Source are those of an intention of this mesh, which may
	// be read from either side. Empty: the source is not known, or another mesh's.
	SourceNamespace, Source string
	// Some asks whether there is anything of the Resource, in Namespace unless that
	// is empty, that the caller may do this with: what is listed is told apart one
	// by one then.
	Some bool
}

// String returns "write intention default/api".
func (r Request) String() string {
	kind := string(r.Resource)
	switch {
	case r.Resource == Each || r.Resource == Self:
		return "do this"
	case r.Some && r.Namespace != "":
		return fmt.Sprintf("%s any %s in %s", r.Verb, kind, r.Namespace)
	case r.Some:
		return fmt.Sprintf("%s any %s", r.Verb, kind)
	}
	s := string(r.Verb) + " " + kind
	namespaced, named := catalog.ScopeOfKind(kind)
	switch {
	case r.Namespace != "" && r.Name != "":
		return s + " " + r.Namespace + "/" + r.Name
	case r.Namespace != "":
		return s + " " + r.Namespace + "/*"
	case r.Name != "":
		return s + " " + r.Name
	case named && namespaced:
		return s + " */*"
	case named:
		return s + " *"
	default:
		return s
	}
}

// DeniedError is a refusal. It wraps ErrUnauthenticated or ErrDenied.
type DeniedError struct {
	Identity Identity
	Request  Request
}

// Error says who was refused what, and what would be needed.
func (e *DeniedError) Error() string {
	if e.Identity.Subject == Anonymous {
		return fmt.Sprintf("%v: to %s takes %s", ErrUnauthenticated, e.Request, e.Request.needs())
	}
	return fmt.Sprintf("%v: %s may not %s; it needs %s", ErrDenied, e.Identity.Describe(), e.Request, e.Request.needs())
}

// Unwrap returns the sentinel that fits.
func (e *DeniedError) Unwrap() error {
	if e.Identity.Subject == Anonymous {
		return ErrUnauthenticated
	}
	return ErrDenied
}

// Needs returns the narrowest rule that would allow the request; ok is false if no
// policy can.
func (r Request) Needs() (rule catalog.PolicyRule, ok bool) {
	kind := string(r.Resource)
	if !slices.Contains(catalog.PolicyKinds(), kind) {
		return rule, false
	}
	rule = catalog.PolicyRule{Kinds: []string{kind}, Verbs: []string{string(r.Verb)}}
	namespaced, named := catalog.ScopeOfKind(kind)
	if namespaced {
		rule.Namespace = cmp.Or(r.Namespace, anything)
	}
	if named {
		rule.Name = cmp.Or(r.Name, anything)
	}
	return rule, true
}

func (r Request) needs() string {
	switch r.Resource {
	case Sync, Register, Sign, Leave, Watch:
		return "the certificate of node " + r.Name
	case Each, Self:
		return "a token"
	default:
	}
	rule, ok := r.Needs()
	if !ok {
		return "a token with the policy " + catalog.PolicyAdmin
	}
	return "a policy with " + rule.String()
}

// Authorize returns nil if the caller may do this, else a *DeniedError. It is
// pure, and what it does not know it denies. That a caller is who Identity says,
// and that a node still exists, is for the one who made the Identity to know.
func Authorize(who Identity, what Request) error {
	if May(who, what) {
		return nil
	}
	return &DeniedError{Identity: who, Request: what}
}

// May is Authorize for those who need no reason. It allocates nothing.
func May(who Identity, what Request) bool { return what.public() || who.may(what) }

// public tells what needs no identity: what a load balancer asks, what is public
// by nature, and what carries its own proof.
func (r Request) public() bool {
	switch r.Resource {
	case Health, Roots:
		return r.Verb == Read
	case Join:
		return r.Verb == Write
	default:
		return false
	}
}

func (i Identity) may(r Request) bool {
	if r.Verb != Read && r.Verb != Write && (r.Verb != Tap || r.Resource != Service) {
		return false
	}
	switch r.Resource {
	case Sync, Register, Sign, Leave, Watch:
		return i.Subject == Host && i.Name != "" && i.Name == r.Name
	case Each, Self:
		return i.Subject == Local || i.Subject == Bearer
	default:
	}
	switch i.Subject {
	case Local:
		return true
	case Bearer:
		return i.Rights.may(r)
	default:
		return false
	}
}

// Covers reports whether the caller may do everything that the rule allows: who
// does not have a permission can't give it away.
func (i Identity) Covers(rule catalog.PolicyRule) bool {
	return i.Subject == Local || i.Subject == Bearer && i.Rights.covers(rule)
}

// AllowedBy returns the policy, and its rule, that allows a request to a token; ok is
// false if none does.
func (i Identity) AllowedBy(what Request) (policy string, rule catalog.PolicyRule, ok bool) {
	if i.Subject != Bearer {
		return "", rule, false
	}
	return i.Rights.allowedBy(what)
}

// Rules returns all that the caller may do, as rules.
func (i Identity) Rules() []catalog.PolicyRule {
	switch i.Subject {
	case Local:
		return catalog.BuiltinPolicies()[0].Rules
	case Bearer:
		return i.Rights.rules()
	default:
		return []catalog.PolicyRule{}
	}
}

// Outlives reports whether a token that ends at t, or never, goes on when the
// caller's own has ended.
func (i Identity) Outlives(t *time.Time) bool {
	return !i.Expires.IsZero() && (t == nil || t.After(i.Expires))
}
