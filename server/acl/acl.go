// Package acl decides who may do what on the servers. There is one function for
// every route, HTTP or gRPC: [Authorize]. It also holds the records of tokens,
// of which only a hash is ever stored.
package acl

import (
	"errors"
	"fmt"
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
	// Role is that of the token.
	Role Role
	// Title is what people call the caller, such as the description of the token;
	// it proves nothing.
	Title string
}

// String names the caller in messages and in the audit trail; it holds no secret.
func (i Identity) String() string {
	if i.Name == "" {
		return i.Subject.String()
	}
	return i.Subject.String() + ":" + i.Name
}

// Role is what a token is for. The zero Role may do nothing.
type Role string

// RoleAdmin may do everything that people may do.
const RoleAdmin Role = "admin"

// Verb is what is done to a resource.
type Verb string

// The verbs.
const (
	Read  Verb = "read"
	Write Verb = "write"
	// Tap is to see single requests to a service: who sends them, and their paths.
	Tap Verb = "tap"
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
	Tokens     Resource = "token"
	JoinTokens Resource = "join-token"
	Authority  Resource = "ca"
	Operator   Resource = "operator" // the cluster itself: its members, leases held back
	Snapshot   Resource = "snapshot" // the whole state, with all that is secret in it
	Audit      Resource = "audit"    // who did what
	Policies   Resource = "policy"
	Roles      Resource = "role"
	Proxy      Resource = "proxy" // what proxies run, and what they see
	// Each is for routes whose handlers authorize each thing that they come to: all
	// but anonymous callers may try.
	Each Resource = "each"

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
	// Namespace and Name tell which one. Empty means all of them, as in a list;
	// for an agent's own calls Name is the node.
	Namespace, Name string
}

// String returns "write intention default/api".
func (r Request) String() string {
	s := string(r.Verb) + " " + string(r.Resource)
	switch {
	case r.Namespace != "" && r.Name != "":
		return s + " " + r.Namespace + "/" + r.Name
	case r.Namespace != "":
		return s + " in " + r.Namespace
	case r.Name != "":
		return s + " " + r.Name
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
	return fmt.Sprintf("%v: %s may not %s; it needs %s", e.Unwrap(), e.Identity, e.Request, e.Request.needs())
}

// Unwrap returns the sentinel that fits.
func (e *DeniedError) Unwrap() error {
	if e.Identity.Subject == Anonymous {
		return ErrUnauthenticated
	}
	return ErrDenied
}

func (r Request) needs() string {
	switch r.Resource {
	case Sync, Register, Sign, Leave, Watch:
		return "the certificate of node " + r.Name
	default:
	}
	return fmt.Sprintf("a token with permission %s:%s (an admin token has it)", r.Resource, r.Verb)
}

// Authorize returns nil if the caller may do this, else a *DeniedError. It is
// pure, and what it does not know it denies. That a caller is who Identity says,
// and that a node still exists, is for the one who made the Identity to know.
func Authorize(who Identity, what Request) error {
	if what.public() || who.may(what) {
		return nil
	}
	return &DeniedError{Identity: who, Request: what}
}

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
	case Each:
		return i.Subject == Local || i.Subject == Bearer
	default:
	}
	switch i.Subject {
	case Local:
		return true
	case Bearer:
		return i.Role == RoleAdmin
	default:
		return false
	}
}
