package ca_test

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
)

func TestBundle(t *testing.T) {
	a, b, c := newAuthority(t, home), newAuthority(t, home), newAuthority(t, foreign)
	two, err := ca.NewBundle(home, a.root, b.root)
	if err != nil {
		t.Fatal(err)
	}
	reversed, err := ca.NewBundle(home, b.root, a.root, b.root)
	if err != nil {
		t.Fatal(err)
	}
	if !two.Equal(reversed) || two.Hash(home) != reversed.Hash(home) {
		t.Error("order and repetition of roots make a difference")
	}
	if two.Equal(a.bundle) || two.Hash(home) == a.bundle.Hash(home) || a.bundle.Hash(home) == b.bundle.Hash(home) {
		t.Error("different roots are the same")
	}
	moved, err := ca.NewBundle(foreign, a.root)
	if err != nil {
		t.Fatal(err)
	}
	if moved.Hash(foreign) == a.bundle.Hash(home) || moved.Equal(a.bundle) {
		t.Error("the trust domain is not part of the hash")
	}

	merged := a.bundle.Merge(c.bundle).Merge(b.bundle)
	if got, want := merged.TrustDomains(), []string{home, foreign}; !slices.Equal(got, want) {
		t.Errorf("trust domains %v, want %v", got, want)
	}
	if merged.Hash(home) != two.Hash(home) || merged.Hash(foreign) != c.bundle.Hash(foreign) || len(merged.Roots(home)) != 2 {
		t.Error("the merged bundle does not hold what went in")
	}
	if len(a.bundle.Roots(home)) != 1 || len(a.bundle.TrustDomains()) != 1 {
		t.Error("merging changed a bundle")
	}
	if !merged.Merge(a.bundle).Equal(merged) || !(ca.Bundle{}).Merge(merged).Equal(merged) || !merged.Merge(ca.Bundle{}).Equal(merged) {
		t.Error("merging what is there already makes a difference")
	}
	clear(merged.Roots(home))
	if merged.Roots(home)[0] == nil {
		t.Error("a caller can change the bundle through Roots")
	}
}

func TestZeroBundle(t *testing.T) {
	var zero ca.Bundle
	if !zero.IsZero() || zero.Roots(home) != nil || !zero.Hash(home).IsZero() || len(zero.TrustDomains()) != 0 || !zero.Equal(ca.Bundle{}) || len(zero.PEM(home)) != 0 {
		t.Error("the zero bundle is not empty")
	}
	data, err := json.Marshal(zero)
	if err != nil || string(data) != "{}" {
		t.Errorf("JSON %s, %v", data, err)
	}
}

func TestNewBundleRefuses(t *testing.T) {
	a := newAuthority(t, home)
	leaf := a.leaf(t, web).Chain()[0]
	for name, make := range map[string]func() (ca.Bundle, error){
		"no roots":         func() (ca.Bundle, error) { return ca.NewBundle(home) },
		"nil root":         func() (ca.Bundle, error) { return ca.NewBundle(home, nil) },
		"a leaf":           func() (ca.Bundle, error) { return ca.NewBundle(home, leaf) },
		"no trust domain":  func() (ca.Bundle, error) { return ca.NewBundle("", a.root) },
		"bad trust domain": func() (ca.Bundle, error) { return ca.NewBundle("Mesh", a.root) },
		"PEM of a leaf":    func() (ca.Bundle, error) { return ca.ParseRootsPEM(ca.Chain{leaf}.PEM()) },
		"PEM of nothing":   func() (ca.Bundle, error) { return ca.ParseRootsPEM(nil) },
		"cut PEM":          func() (ca.Bundle, error) { return ca.ParseRootsPEM(a.bundle.PEM(home)[:200]) },
		"other PEM": func() (ca.Bundle, error) {
			return ca.ParseRootsPEM(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: a.root.Raw}))
		},
	} {
		if b, err := make(); !errors.Is(err, ca.ErrBundle) || !b.IsZero() {
			t.Errorf("%s: bundle of %v, error %v; want ErrBundle", name, b.TrustDomains(), err)
		}
	}
}

func TestBundleEncodings(t *testing.T) {
	a, b := newAuthority(t, home), newAuthority(t, foreign)
	both := a.bundle.Merge(b.bundle)
	data, err := json.Marshal(struct{ Roots ca.Bundle }{both})
	if err != nil {
		t.Fatal(err)
	}
	var form struct{ Roots map[string][][]byte }
	if err := json.Unmarshal(data, &form); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string][][]byte{home: {a.root.Raw}, foreign: {b.root.Raw}}, form.Roots); diff != "" {
		t.Errorf("JSON form (-want +got):\n%s", diff)
	}
	var back struct{ Roots ca.Bundle }
	if err := json.Unmarshal(data, &back); err != nil || !back.Roots.Equal(both) {
		t.Errorf("through JSON: %v, error %v", back.Roots.TrustDomains(), err)
	}
	fromPEM, err := ca.ParseRootsPEM(slices.Concat([]byte("# a comment\n"), both.PEM(home), both.PEM(foreign)))
	if err != nil || !fromPEM.Equal(both) {
		t.Errorf("through PEM: %v, error %v", fromPEM.TrustDomains(), err)
	}
}

func TestBundleJSONRefuses(t *testing.T) {
	a := newAuthority(t, home)
	for name, form := range map[string]any{
		"list":             []string{},
		"no roots":         map[string][][]byte{home: {}},
		"not a cert":       map[string][][]byte{home: {[]byte("x")}},
		"a leaf":           map[string][][]byte{home: {a.leaf(t, web).Chain()[0].Raw}},
		"bad trust domain": map[string][][]byte{"MESH": {a.root.Raw}},
		"too many":         map[string][][]byte{home: slices.Repeat([][]byte{a.root.Raw}, 65)},
	} {
		data, err := json.Marshal(form)
		if err != nil {
			t.Fatal(err)
		}
		b := a.bundle
		if err := json.Unmarshal(data, &b); err == nil || !b.Equal(a.bundle) {
			t.Errorf("%s: error %v, bundle changed %v", name, err, !b.Equal(a.bundle))
		}
	}
}

func TestHash(t *testing.T) {
	hash := newAuthority(t, home).bundle.Hash(home)
	back, err := ca.ParseHash(hash.String())
	if err != nil || back != hash {
		t.Errorf("%s came back as %s, %v", hash, back, err)
	}
	data, err := json.Marshal(hash)
	if err != nil || string(data) != `"`+hash.String()+`"` {
		t.Errorf("JSON %s, %v", data, err)
	}
	if err := json.Unmarshal(data, &back); err != nil || back != hash {
		t.Errorf("through JSON: %s, %v", back, err)
	}
	for _, text := range []string{"", "sha256:", hash.String()[7:], hash.String() + "0", hash.String()[:70], "sha512:" + hash.String()[7:], "sha256:" + string(bytes.Repeat([]byte("g"), 64))} {
		if got, err := ca.ParseHash(text); !errors.Is(err, ca.ErrBundle) || !got.IsZero() {
			t.Errorf("%q was read as %s, %v", text, got, err)
		}
	}
}

func FuzzBundleJSON(f *testing.F) {
	a := fixedAuthority(f, home, 1)
	data, err := json.Marshal(a.bundle)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"dev":[]}`))
	f.Add([]byte(`{"dev":["AAAA"]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b ca.Bundle
		if err := json.Unmarshal(data, &b); err != nil {
			if !b.IsZero() {
				t.Fatal("refused, yet changed the bundle")
			}
			return
		}
		again, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		var back ca.Bundle
		if err := json.Unmarshal(again, &back); err != nil || !back.Equal(b) {
			t.Fatalf("its own JSON %s gives %v, %v", again, back.TrustDomains(), err)
		}
		for _, td := range b.TrustDomains() {
			if len(b.Roots(td)) == 0 || b.Hash(td).IsZero() {
				t.Fatalf("%q has no roots", td)
			}
		}
	})
}
