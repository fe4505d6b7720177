package ca_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
)

func token(servers ...string) ca.JoinToken {
	return ca.JoinToken{Servers: servers, Roots: ca.Hash{1, 2, 3, 31: 32}, Secret: ca.NewSecret([]byte("0123456789abcdef0123456789abcdef"))}
}

func TestJoinToken(t *testing.T) {
	for _, want := range []ca.JoinToken{
		token("10.0.0.11:7400"),
		token("10.0.0.11:7400", "[fd00::1]:7400", "meshd.example.com:443"),
	} {
		text, err := want.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(text, "mesh1.") || strings.ContainsAny(text, " +/=\n") {
			t.Errorf("%q is not one word with the version in front", text)
		}
		for _, pasted := range []string{text, " " + text + "\r\n"} {
			got, err := ca.ParseJoinToken(pasted)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
	}
}

// The text form is a contract with tokens that are in use while servers or agents are upgraded.
func TestJoinTokenForm(t *testing.T) {
	text, err := token("10.0.0.11:7400").Encode()
	const want = "mesh1.AFgBAgMAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAICAwMTIzNDU2Nzg5YWJjZGVmMDEyMzQ1Njc4OWFiY2RlZgEADjEwLjAuMC4xMTo3NDAwJk6T8w"
	if err != nil || text != want {
		t.Errorf("got  %s, %v\nwant %s", text, err, want)
	}
}

func TestJoinTokenRefusesFields(t *testing.T) {
	secret := func(n int) ca.JoinToken {
		tok := token("a:1")
		tok.Secret = ca.NewSecret(bytes.Repeat([]byte{1}, n))
		return tok
	}
	unpinned := token("a:1")
	unpinned.Roots = ca.Hash{}
	for name, tok := range map[string]ca.JoinToken{
		"zero": {}, "no pin": unpinned, "no servers": token(), "many servers": token(strings.Split(strings.Repeat("a:1 ", 17), " ")[:17]...),
		"short secret": secret(15), "long secret": secret(65), "no port": token("a"), "port 0": token("a:0"), "big port": token("a:65536"),
		"named port": token("a:https"), "no host": token(":7400"), "bare IPv6": token("fd00::1:7400"), "space": token("a b:1"), "line break": token("a\n:1"),
		"not ASCII": token("ä:1"), "long host": token(strings.Repeat("a", 300) + ":1"),
	} {
		if text, err := tok.Encode(); !errors.Is(err, ca.ErrJoinToken) || text != "" {
			t.Errorf("%s: %q, error %v; want ErrJoinToken", name, text, err)
		}
	}
}

// Every way to damage a token is told apart from a token that is merely unknown, and a missing end from a changed letter.
func TestJoinTokenDamage(t *testing.T) {
	text, err := token("10.0.0.11:7400", "10.0.0.12:7400").Encode()
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n < len(text); n++ {
		_, err := ca.ParseJoinToken(text[:n])
		if !errors.Is(err, ca.ErrJoinToken) || !errors.Is(err, ca.ErrJoinTokenTruncated) {
			t.Errorf("the first %d of %d characters: error %v, want ErrJoinTokenTruncated", n, len(text), err)
		}
	}
	for i := range len(text) {
		for _, c := range []byte("aZ7_ \n.") {
			if text[i] == c {
				continue
			}
			changed := text[:i] + string(c) + text[i+1:]
			if i == len(text)-1 && (c == ' ' || c == '\n') {
				continue // that is a missing end
			}
			if _, err := ca.ParseJoinToken(changed); !errors.Is(err, ca.ErrJoinToken) {
				t.Errorf("character %d changed to %q: error %v, want ErrJoinToken", i+1, c, err)
			}
		}
	}
	for name, bad := range map[string]string{
		"empty": "", "other word": "hello", "other version": "mesh2." + text[6:], "twice": text + text, "one more": text + "A", "padded": text + "=",
		"two lines": text[:40] + "\n" + text[40:], "huge": "mesh1." + strings.Repeat("A", 1<<20), "no payload but a length": "mesh1.AAUAAAA",
	} {
		_, err := ca.ParseJoinToken(bad)
		if !errors.Is(err, ca.ErrJoinToken) || errors.Is(err, ca.ErrJoinTokenTruncated) {
			t.Errorf("%s: error %v, want ErrJoinToken and not ErrJoinTokenTruncated", name, err)
		}
		if len(bad) > 20 && err != nil && strings.Contains(err.Error(), bad[10:20]) {
			t.Errorf("%s: the error quotes the token: %v", name, err)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	text, err := token("10.0.0.11:7400", "[fd00::1]:7400").Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(text[:50])
	f.Add("mesh1.AAYAAAAA")
	f.Add("mesh1.")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ca.ParseJoinToken(text)
		if err != nil {
			if !errors.Is(err, ca.ErrJoinToken) {
				t.Fatal(err)
			}
			return
		}
		again, err := tok.Encode()
		if err != nil || again != strings.TrimSpace(text) {
			t.Fatalf("%q came back as %q, %v", text, again, err)
		}
	})
}
