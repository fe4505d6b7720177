package acl_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/server/acl"
)

func TestAuthorize(t *testing.T) {
	t.Parallel()
	anonymous := acl.Identity{}
	admin := acl.Identity{Subject: acl.Bearer, Name: "a1", Role: acl.RoleAdmin}
	powerless := acl.Identity{Subject: acl.Bearer, Name: "a2"}
	local := acl.Identity{Subject: acl.Local, Name: "root"}
	vmA := acl.Identity{Subject: acl.Host, Name: "vm-a"}
	nameless := acl.Identity{Subject: acl.Host}
	strange := acl.Identity{Subject: 99, Name: "x", Role: acl.RoleAdmin}
	type ids []acl.Identity
	all := ids{anonymous, admin, powerless, local, vmA, nameless, strange}
	for _, row := range []struct {
		request acl.Request
		allowed ids
	}{
		{acl.Request{Verb: acl.Read, Resource: acl.Health}, all},
		{acl.Request{Verb: acl.Read, Resource: acl.Roots}, all},
		{acl.Request{Verb: acl.Write, Resource: acl.Join}, all},
		{acl.Request{Verb: acl.Write, Resource: acl.Health}, ids{admin, local}},
		{acl.Request{Verb: acl.Read, Resource: acl.Join}, ids{admin, local}},
		{acl.Request{Verb: acl.Read, Resource: acl.Intention}, ids{admin, local}},
		{acl.Request{Verb: acl.Write, Resource: acl.Intention, Namespace: "default", Name: "api"}, ids{admin, local}},
		{acl.Request{Verb: acl.Write, Resource: acl.Node, Name: "vm-a"}, ids{admin, local}},
		{acl.Request{Verb: acl.Write, Resource: acl.JoinTokens}, ids{admin, local}},
		{acl.Request{Verb: acl.Read, Resource: acl.Tokens}, ids{admin, local}},
		{acl.Request{Verb: acl.Write, Resource: acl.Operator}, ids{admin, local}},
		{acl.Request{Verb: acl.Write, Resource: acl.Sync, Name: "vm-a"}, ids{vmA}},
		{acl.Request{Verb: acl.Write, Resource: acl.Register, Name: "vm-a"}, ids{vmA}},
		{acl.Request{Verb: acl.Write, Resource: acl.Sign, Name: "vm-b"}, nil},
		{acl.Request{Verb: acl.Write, Resource: acl.Leave, Name: ""}, nil},
		{acl.Request{Verb: acl.Write, Resource: acl.Watch, Name: "vm-a"}, ids{vmA}},
		{acl.Request{Verb: acl.Write, Resource: acl.Watch, Name: "vm-b"}, nil},
		{acl.Request{Verb: acl.Tap, Resource: acl.Service}, ids{admin, local}},
		{acl.Request{Verb: acl.Tap, Resource: acl.Service, Namespace: "default", Name: "api"}, ids{admin, local}},
		{acl.Request{Verb: acl.Tap, Resource: acl.Node}, nil},
		{acl.Request{Verb: acl.Tap, Resource: acl.Health}, nil},
		{acl.Request{Verb: acl.Write, Resource: "mistyped"}, ids{admin, local}},
		{acl.Request{Verb: "", Resource: acl.Intention}, nil},
		{acl.Request{Verb: "own", Resource: acl.Sync, Name: "vm-a"}, nil},
		{acl.Request{}, nil},
	} {
		for _, who := range all {
			want := false
			for _, a := range row.allowed {
				want = want || a == who
			}
			err := acl.Authorize(who, row.request)
			if (err == nil) != want {
				t.Errorf("%v, %v: %v", who, row.request, err)
			}
			if err == nil {
				continue
			}
			sentinel := acl.ErrDenied
			if who == anonymous {
				sentinel = acl.ErrUnauthenticated
			}
			if !errors.Is(err, sentinel) || !strings.Contains(err.Error(), row.request.String()) {
				t.Errorf("%v, %v: error %q", who, row.request, err)
			}
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	token, secret := acl.NewToken(acl.RoleAdmin, "first", now)
	other, otherSecret := acl.NewToken(acl.RoleAdmin, "second", now)
	if secret == otherSecret || token.Accessor == other.Accessor || len(secret) < acl.MinSecret {
		t.Errorf("tokens are not unique: %q, %q", token.Accessor, other.Accessor)
	}
	if _, err := acl.AdoptToken(secret, acl.RoleAdmin, "", now); err != nil {
		t.Errorf("a made token is not good enough to be adopted: %v", err)
	}
	for _, bad := range []string{"", "short", strings.Repeat("a b", 20), strings.Repeat("ü", 40), strings.Repeat("a", 40) + "\n"} {
		if _, err := acl.AdoptToken(bad, acl.RoleAdmin, "", now); !errors.Is(err, acl.ErrToken) {
			t.Errorf("AdoptToken(%q) = %v", bad, err)
		}
	}
	until := now.Add(time.Hour)
	token.Expires = &until
	for _, row := range []struct {
		at   time.Time
		want acl.Identity
	}{
		{now, acl.Identity{Subject: acl.Bearer, Name: token.Accessor, Role: acl.RoleAdmin, Title: token.Description}},
		{until.Add(-1), acl.Identity{Subject: acl.Bearer, Name: token.Accessor, Role: acl.RoleAdmin, Title: token.Description}},
		{until, acl.Identity{}},
	} {
		if got := token.Identity(row.at); got != row.want {
			t.Errorf("at %v: %v, want %v", row.at, got, row.want)
		}
	}
}

func TestJoinTokens(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, row := range []struct{ ttl, want time.Duration }{
		{0, acl.DefaultJoinTTL}, {time.Minute, time.Minute}, {acl.MaxJoinTTL, acl.MaxJoinTTL}, {acl.MaxJoinTTL + 1, 0}, {-1, 0},
	} {
		token, secret, err := acl.NewJoinToken("vm-a", []string{"web"}, row.ttl, false, now)
		if row.want == 0 {
			if !errors.Is(err, acl.ErrToken) {
				t.Errorf("ttl %v: %v", row.ttl, err)
			}
			continue
		}
		if err != nil || len(secret) != acl.SecretBytes || token.Expires.Sub(now) != row.want || token.Used != nil {
			t.Errorf("ttl %v: %+v, %d bytes, %v", row.ttl, token, len(secret), err)
		}
		if len(acl.Hash(secret)) != 64 || acl.Hash(secret) == acl.Hash(nil) {
			t.Errorf("hash %q", acl.Hash(secret))
		}
	}
}
