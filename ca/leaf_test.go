package ca_test

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
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
)

func TestLeaf(t *testing.T) {
	leaf := newAuthority(t, home).leaf(t, web)
	if leaf.ID() != web || len(leaf.Chain()) != 2 || leaf.NotAfter() != leaf.Chain()[0].NotAfter || leaf.NotBefore() != leaf.Chain()[0].NotBefore {
		t.Errorf("leaf %v with a chain of %d", leaf, len(leaf.Chain()))
	}
	if cert := leaf.TLS(); cert.Leaf != leaf.Chain()[0] || len(cert.Certificate) != 2 {
		t.Error("the TLS form is another certificate")
	}

	key, err := leaf.KeyDER()
	if err != nil {
		t.Fatal(err)
	}
	fromDER, err := ca.ParseLeaf(leaf.Chain().DER(), key)
	if err != nil {
		t.Fatal(err)
	}
	file, err := leaf.PEM()
	if err != nil {
		t.Fatal(err)
	}
	fromPEM, err := ca.ParseLeafPEM(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, back := range map[string]*ca.Leaf{"DER": fromDER, "PEM": fromPEM} {
		if back.ID() != web || !back.PublicKey().Equal(leaf.PublicKey()) || len(back.Chain()) != 2 || !back.Chain()[1].Equal(leaf.Chain()[1]) {
			t.Errorf("through %s the leaf became %v", name, back)
		}
	}
}

func TestLeafRefuses(t *testing.T) {
	a := newAuthority(t, home)
	key := newKey(t)
	chain := a.chain(t, leafTemplate(web), key.Public())
	good, err := ca.NewLeaf(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := good.KeyDER()
	if err != nil {
		t.Fatal(err)
	}
	file, err := good.PEM()
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edDER, err := x509.MarshalPKCS8PrivateKey(edKey)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var noKey *ecdsa.PrivateKey
	appended := func(kind string, data []byte) ca.Secret {
		return ca.NewSecret(append(bytes.Clone(file.Reveal()), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data})...))
	}
	for name, make := range map[string]func() (*ca.Leaf, error){
		"no chain":               func() (*ca.Leaf, error) { return ca.NewLeaf(nil, key) },
		"no key":                 func() (*ca.Leaf, error) { return ca.NewLeaf(chain, nil) },
		"nil key":                func() (*ca.Leaf, error) { return ca.NewLeaf(chain, noKey) },
		"another key":            func() (*ca.Leaf, error) { return ca.NewLeaf(chain, newKey(t)) },
		"Ed25519":                func() (*ca.Leaf, error) { return ca.NewLeaf(chain, edKey) },
		"P-384":                  func() (*ca.Leaf, error) { return ca.NewLeaf(a.chain(t, leafTemplate(web), p384.Public()), p384) },
		"no identity":            func() (*ca.Leaf, error) { return ca.NewLeaf(a.chain(t, leafTemplate(), key.Public()), key) },
		"a CA":                   func() (*ca.Leaf, error) { return ca.NewLeaf(ca.Chain{a.intermediate}, a.key) },
		"DER of no chain":        func() (*ca.Leaf, error) { return ca.ParseLeaf(nil, keyDER) },
		"DER of a broken chain":  func() (*ca.Leaf, error) { return ca.ParseLeaf([][]byte{{1}}, keyDER) },
		"DER of no key":          func() (*ca.Leaf, error) { return ca.ParseLeaf(chain.DER(), ca.Secret{}) },
		"DER of another key":     func() (*ca.Leaf, error) { return ca.ParseLeaf(chain.DER(), ca.NewSecret(edDER)) },
		"PEM of nothing":         func() (*ca.Leaf, error) { return ca.ParseLeafPEM(ca.Secret{}) },
		"PEM without a key":      func() (*ca.Leaf, error) { return ca.ParseLeafPEM(ca.NewSecret(chain.PEM())) },
		"cut PEM":                func() (*ca.Leaf, error) { return ca.ParseLeafPEM(ca.NewSecret(file.Reveal()[:len(file.Reveal())-40])) },
		"PEM with two keys":      func() (*ca.Leaf, error) { return ca.ParseLeafPEM(appended("PRIVATE KEY", keyDER.Reveal())) },
		"PEM with another block": func() (*ca.Leaf, error) { return ca.ParseLeafPEM(appended("EC PARAMETERS", nil)) },
	} {
		if leaf, err := make(); !errors.Is(err, ca.ErrLeaf) || leaf != nil {
			t.Errorf("%s: leaf %v, error %v; want ErrLeaf", name, leaf, err)
		}
	}
}

func TestRenewAt(t *testing.T) {
	a := newAuthority(t, home)
	key := newKey(t)
	issued := time.Now().Truncate(time.Second)
	leaf := func(life time.Duration) *ca.Leaf {
		template := leafTemplate(web)
		template.NotBefore, template.NotAfter = issued.Add(-ca.Backdate), issued.Add(life)
		l, err := ca.NewLeaf(a.chain(t, template, key.Public()), key)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for _, row := range []struct {
		life   time.Duration
		random float64
		want   time.Duration // after issue
	}{
		{24 * time.Hour, 0, 10*time.Hour + 48*time.Minute},
		{24 * time.Hour, 0.5, 12 * time.Hour},
		{24 * time.Hour, 1, 13*time.Hour + 12*time.Minute}, // 10.8 h are left
		{time.Hour, 0.5, 30 * time.Minute},
		{time.Hour, -3, 27 * time.Minute},
		{time.Hour, 7, 33 * time.Minute},
		{-time.Minute, 0.5, -ca.Backdate}, // cut to nothing: at once
	} {
		got := leaf(row.life).RenewAt(row.random).Sub(issued)
		if (got - row.want).Abs() > time.Millisecond {
			t.Errorf("life %s, random %g: renew after %s, want %s", row.life, row.random, got, row.want)
		}
	}
}

// prints is every way that a value reaches a log, a file or a screen by accident.
func prints(t *testing.T, v any) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%T", "%08.3f"} {
		out[verb] = fmt.Sprintf(verb, v)
	}
	out["print"] = fmt.Sprint(v)
	if data, err := json.Marshal(v); err == nil {
		out["json"] = string(data)
	}
	var text, jsonLog bytes.Buffer
	slog.New(slog.NewTextHandler(&text, nil)).Info("x", slog.Any("value", v))
	slog.New(slog.NewJSONHandler(&jsonLog, nil)).Info("x", slog.Any("value", v))
	out["slog text"], out["slog json"] = text.String(), jsonLog.String()
	return out
}

// leaks reports whether text shows data in a form that a printer would give it.
func leaks(text string, data []byte) bool {
	decimals := strings.Trim(fmt.Sprintf("%d", data), "[]")
	quoted := fmt.Sprintf("%q", data)
	for _, form := range []string{
		string(data), hex.EncodeToString(data), strings.ToUpper(hex.EncodeToString(data)), decimals, strings.ReplaceAll(decimals, " ", ","),
		quoted[1 : len(quoted)-1], strings.TrimSuffix(fmt.Sprintf("%#v", data), "}"), new(big.Int).SetBytes(data).String(),
	} {
		if strings.Contains(text, form) {
			return true
		}
	}
	return strings.Contains(text, base64.RawStdEncoding.EncodeToString(data))
}

func TestSecretIsNeverPrinted(t *testing.T) {
	data := []byte("correct horse battery staple")
	secret := ca.NewSecret(data)
	type inside struct {
		Name   string
		Secret ca.Secret
		hidden ca.Secret
	}
	nested := inside{"x", secret, secret}
	if nested.hidden.IsZero() {
		t.Fatal("the field under test is empty")
	}
	for name, v := range map[string]any{
		"value": secret, "pointer": &secret, "struct": nested, "struct pointer": &nested, "slice": []ca.Secret{secret},
		"map": map[string]ca.Secret{"a": secret}, "any": []any{secret}, "join token": ca.JoinToken{Secret: secret},
	} {
		for how, text := range prints(t, v) {
			if leaks(text, data) {
				t.Errorf("%s printed as %s shows the secret: %s", name, how, text)
			}
		}
	}
	for how, text := range prints(t, secret) {
		if how != "%T" && !strings.Contains(text, "***") {
			t.Errorf("printed as %s: %q, want ***", how, text)
		}
	}
	if secret.String() != "***" || secret.GoString() != "***" {
		t.Errorf("%s %s", secret.String(), secret.GoString())
	}
	if string(secret.Reveal()) != string(data) {
		t.Error("Reveal gives something else")
	}
}

func TestSecretEqual(t *testing.T) {
	a, b, c := ca.NewSecret([]byte("one")), ca.NewSecret([]byte("one")), ca.NewSecret([]byte("two"))
	if !a.Equal(b) || a.Equal(c) || a.Equal(ca.Secret{}) || !(ca.Secret{}).Equal(ca.NewSecret(nil)) {
		t.Error("Equal does not compare the bytes")
	}
	if a.IsZero() || !(ca.Secret{}).IsZero() || (ca.Secret{}).Reveal() != nil {
		t.Error("the zero Secret is not the empty one")
	}
}

func TestLeafIsNeverPrinted(t *testing.T) {
	key := newKey(t)
	leaf, err := ca.NewLeaf(newAuthority(t, home).chain(t, leafTemplate(web), key.Public()), key)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	der, err := leaf.KeyDER()
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"pointer": leaf, "value": *leaf, "struct": struct{ Leaf *ca.Leaf }{leaf}, "hidden": struct{ leaf *ca.Leaf }{leaf}, "slice": []*ca.Leaf{leaf},
	} {
		for how, text := range prints(t, v) {
			if leaks(text, scalar) || leaks(text, der.Reveal()) {
				t.Errorf("%s printed as %s shows the key: %s", name, how, text)
			}
		}
	}
	if got, want := fmt.Sprintf("%v", leaf), web.String()+" until "+leaf.NotAfter().UTC().Format(time.RFC3339); got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	if _, err := json.Marshal(leaf); !errors.Is(err, ca.ErrLeaf) {
		t.Errorf("JSON: error %v, want ErrLeaf", err)
	}
	var none *ca.Leaf
	if got := fmt.Sprintf("%v", none); got != "no leaf" {
		t.Errorf("a nil leaf prints %q", got)
	}
}

func FuzzParseLeafPEM(f *testing.F) {
	leaf := fixedAuthority(f, home, 1).fixedLeaf(f, web, 3)
	file, err := leaf.PEM()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file.Reveal())
	f.Add(leaf.Chain().PEM())
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ca.ParseLeafPEM(ca.NewSecret(data))
		if err != nil {
			if !errors.Is(err, ca.ErrLeaf) || got != nil {
				t.Fatalf("leaf %v, error %v", got, err)
			}
			return
		}
		if err := got.ID().Valid(); err != nil || !got.PublicKey().Equal(got.Chain()[0].PublicKey) {
			t.Fatalf("leaf %v is inconsistent: %v", got, err)
		}
	})
}
