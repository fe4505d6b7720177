package spiffe_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
)

const (
	label63 = "a23456789012345678901234567890123456789012345678901234567890123"
	label64 = label63 + "4"
)

// domain255 has four labels of 63 characters and three dots.
var domain255 = strings.Join([]string{label63, label63, label63, label63}, ".")

func TestParse(t *testing.T) {
	for _, row := range []struct {
		text string
		want spiffe.ID
	}{
		{"spiffe://mesh.example.com/ns/default/svc/web", spiffe.Service("mesh.example.com", "default", "web")},
		{"spiffe://mesh.example.com/node/vm-017", spiffe.Node("mesh.example.com", "vm-017")},
		{"spiffe://mesh.example.com/server/7f3a91", spiffe.Server("mesh.example.com", "7f3a91")},
		{"spiffe://dev/ns/a/svc/b", spiffe.Service("dev", "a", "b")},
		{"spiffe://1.2.3.4.example/node/9", spiffe.Node("1.2.3.4.example", "9")},
		{"spiffe://ns/ns/ns/svc/svc", spiffe.Service("ns", "ns", "svc")},
		{"spiffe://node/node/node", spiffe.Node("node", "node")},
		{"spiffe://dev/ns/" + label63 + "/svc/" + label63, spiffe.Service("dev", label63, label63)},
		{"spiffe://" + domain255 + "/node/a", spiffe.Node(domain255, "a")},
	} {
		got, err := spiffe.Parse(row.text)
		if err != nil || got != row.want {
			t.Errorf("Parse(%q) = %+v, %v; want %+v", row.text, got, err, row.want)
		}
		if got.String() != row.text {
			t.Errorf("%q came back as %q", row.text, got)
		}
		if got.URL().String() != row.text {
			t.Errorf("%q as a URL is %q", row.text, got.URL())
		}
	}
}

// refused is every text that is no identity: used by the parser's table, by text unmarshalling, and as seeds.
var refused = map[string]string{
	"empty":                     "",
	"other scheme":              "https://dev/node/a",
	"upper-case scheme":         "SPIFFE://dev/node/a",
	"scheme alone":              "spiffe://",
	"one slash":                 "spiffe:/dev/node/a",
	"opaque":                    "spiffe:dev/node/a",
	"space before":              " spiffe://dev/node/a",
	"line break after":          "spiffe://dev/node/a\n",
	"no trust domain":           "spiffe:///node/a",
	"trust domain alone":        "spiffe://dev",
	"trust domain and slash":    "spiffe://dev/",
	"upper-case trust domain":   "spiffe://Dev/node/a",
	"underscore in domain":      "spiffe://a_b/node/a",
	"empty label in domain":     "spiffe://a..b/node/a",
	"dot before domain":         "spiffe://.b/node/a",
	"dot after domain":          "spiffe://dev./node/a",
	"hyphen before domain":      "spiffe://-dev/node/a",
	"domain label too long":     "spiffe://" + label64 + "/node/a",
	"domain too long":           "spiffe://" + domain255 + ".a/node/a",
	"IPv4 trust domain":         "spiffe://10.0.0.1/node/a",
	"IPv6 trust domain":         "spiffe://[::1]/node/a",
	"port":                      "spiffe://dev:443/node/a",
	"empty port":                "spiffe://dev:/node/a",
	"user":                      "spiffe://root@dev/node/a",
	"empty user":                "spiffe://@dev/node/a",
	"query":                     "spiffe://dev/node/a?b=c",
	"empty query":               "spiffe://dev/node/a?",
	"query before path":         "spiffe://dev?/node/a",
	"fragment":                  "spiffe://dev/node/a#b",
	"empty fragment":            "spiffe://dev/node/a#",
	"percent-encoded letter":    "spiffe://dev/node/%61",
	"percent-encoded slash":     "spiffe://dev/ns/a%2fsvc/svc/b",
	"percent-encoded domain":    "spiffe://d%65v/node/a",
	"slash after":               "spiffe://dev/node/a/",
	"two slashes":               "spiffe://dev//node/a",
	"two slashes inside":        "spiffe://dev/node//a",
	"dot segment":               "spiffe://dev/node/./a",
	"dot name":                  "spiffe://dev/node/.",
	"dot-dot segment":           "spiffe://dev/ns/a/../b/svc/c",
	"dot-dot name":              "spiffe://dev/node/..",
	"unknown kind":              "spiffe://dev/sa/a",
	"upper-case kind":           "spiffe://dev/Node/a",
	"upper-case name":           "spiffe://dev/node/A",
	"node without a name":       "spiffe://dev/node",
	"node with an empty name":   "spiffe://dev/node/",
	"node with two names":       "spiffe://dev/node/a/b",
	"server without a name":     "spiffe://dev/server",
	"namespace alone":           "spiffe://dev/ns/a",
	"no service":                "spiffe://dev/ns/a/svc",
	"empty service":             "spiffe://dev/ns/a/svc/",
	"empty namespace":           "spiffe://dev/ns//svc/b",
	"wildcard":                  "spiffe://dev/ns/a/svc/*",
	"Istio's grammar":           "spiffe://dev/ns/a/sa/b",
	"Consul's grammar":          "spiffe://dev/ns/a/dc/b/svc/c",
	"longer than the grammar":   "spiffe://dev/ns/a/svc/b/c",
	"dot in a name":             "spiffe://dev/node/a.b",
	"underscore in a name":      "spiffe://dev/node/a_b",
	"hyphen first":              "spiffe://dev/node/-a",
	"hyphen last":               "spiffe://dev/node/a-",
	"name too long":             "spiffe://dev/node/" + label64,
	"namespace too long":        "spiffe://dev/ns/" + label64 + "/svc/a",
	"not ASCII":                 "spiffe://dev/node/ä",
	"not UTF-8":                 "spiffe://dev/node/a\xff",
	"NUL":                       "spiffe://dev/node/a\x00",
	"NUL in the domain":         "spiffe://dev\x00.evil/node/a",
	"backslash":                 `spiffe://dev\node\a`,
	"longer than 2048":          "spiffe://dev/node/" + strings.Repeat("a", 2048),
	"two joined by a comma":     "spiffe://dev/node/a,spiffe://dev/node/b",
	"service path under a node": "spiffe://dev/node/ns/a/svc/b",
}

func TestParseRefuses(t *testing.T) {
	for name, text := range refused {
		id, err := spiffe.Parse(text)
		if !errors.Is(err, spiffe.ErrInvalid) || !id.IsZero() {
			t.Errorf("%s: Parse(%q) = %+v, %v; want the zero ID and ErrInvalid", name, text, id, err)
		}
	}
}

func TestValid(t *testing.T) {
	for name, id := range map[string]spiffe.ID{
		"zero":                  {},
		"no kind":               {TrustDomain: "dev", Name: "a"},
		"unknown kind":          {TrustDomain: "dev", Kind: 4, Name: "a"},
		"node with a namespace": {TrustDomain: "dev", Kind: spiffe.KindNode, Namespace: "a", Name: "b"},
		"no namespace":          spiffe.Service("dev", "", "a"),
		"slash in a name":       spiffe.Node("dev", "a/b"),
	} {
		if err := id.Valid(); !errors.Is(err, spiffe.ErrInvalid) {
			t.Errorf("%s: error %v, want ErrInvalid", name, err)
		}
		if _, err := id.MarshalText(); err == nil && !id.IsZero() {
			t.Errorf("%s: was marshalled", name)
		}
	}
	if err := spiffe.Service("dev", "a", "b").Valid(); err != nil {
		t.Error(err)
	}
}

func TestKindString(t *testing.T) {
	for kind, want := range map[spiffe.Kind]string{
		0: "invalid", spiffe.KindService: "service", spiffe.KindNode: "node", spiffe.KindServer: "server", 4: "invalid",
	} {
		if got := kind.String(); got != want {
			t.Errorf("kind %d is %q, want %q", kind, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	type record struct {
		ID    spiffe.ID            `json:"id"`
		Seen  map[spiffe.ID]string `json:"seen,omitempty"`
		Other *spiffe.ID           `json:"other,omitempty"`
	}
	web := spiffe.Service("dev", "default", "web")
	for _, row := range []struct {
		value record
		want  string
	}{
		{record{}, `{"id":""}`},
		{
			record{ID: web, Seen: map[spiffe.ID]string{spiffe.Node("dev", "a"): "x"}, Other: &web},
			`{"id":"spiffe://dev/ns/default/svc/web","seen":{"spiffe://dev/node/a":"x"},"other":"spiffe://dev/ns/default/svc/web"}`,
		},
	} {
		data, err := json.Marshal(row.value)
		if err != nil || string(data) != row.want {
			t.Errorf("%+v became %s, %v; want %s", row.value, data, err, row.want)
		}
		var back record
		if err := json.Unmarshal(data, &back); err != nil {
			t.Errorf("%s: %v", data, err)
		}
		if diff := cmp.Diff(row.value, back); diff != "" {
			t.Errorf("%s (-want +got):\n%s", data, diff)
		}
	}
	for name, text := range refused {
		id := web
		if err := id.UnmarshalText([]byte(text)); text != "" && (err == nil || id != web) {
			t.Errorf("%s: %q was unmarshalled to %q", name, text, id)
		}
	}
}

// certificate makes a self-signed certificate around URI names that need not be URLs.
func certificate(t *testing.T, template *x509.Certificate, uris ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotAfter = big.NewInt(1), time.Now().Add(time.Hour)
	if uris != nil {
		var names []asn1.RawValue
		for _, uri := range uris {
			names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
		}
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte("a.example.com")})
		value, err := asn1.Marshal(names)
		if err != nil {
			t.Fatal(err)
		}
		template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value})
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("package x509 refuses the certificate already: %v", err)
	}
	return cert
}

func TestFromCert(t *testing.T) {
	const web = "spiffe://dev/ns/default/svc/web"
	id, err := spiffe.FromCert(certificate(t, &x509.Certificate{BasicConstraintsValid: true}, web))
	if err != nil || id != spiffe.Service("dev", "default", "web") {
		t.Errorf("got %q, %v", id, err)
	}
	for name, cert := range map[string]*x509.Certificate{
		"nil":               nil,
		"no names":          certificate(t, &x509.Certificate{}),
		"only a DNS name":   certificate(t, &x509.Certificate{}, []string{}...),
		"two URIs":          certificate(t, &x509.Certificate{}, web, "spiffe://dev/node/a"),
		"the same twice":    certificate(t, &x509.Certificate{}, web, web),
		"a URI beside":      certificate(t, &x509.Certificate{}, web, "https://example.com/"),
		"upper-case scheme": certificate(t, &x509.Certificate{}, "SPIFFE://dev/ns/default/svc/web"),
		"empty fragment":    certificate(t, &x509.Certificate{}, web+"#"),
		"percent-encoded":   certificate(t, &x509.Certificate{}, "spiffe://dev/ns/default/svc/we%62"),
		"CA":                certificate(t, &x509.Certificate{BasicConstraintsValid: true, IsCA: true}, web),
		"may sign":          certificate(t, &x509.Certificate{BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, web),
		"may sign CRLs":     certificate(t, &x509.Certificate{BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCRLSign}, web),
		"not parsed":        {URIs: []*url.URL{spiffe.Service("dev", "default", "web").URL()}},
	} {
		if id, err := spiffe.FromCert(cert); !errors.Is(err, spiffe.ErrCertificate) || !id.IsZero() {
			t.Errorf("%s: got %q, %v; want ErrCertificate", name, id, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range refused {
		f.Add(text)
	}
	f.Add("spiffe://dev/ns/default/svc/web")
	f.Add("spiffe://mesh.example.com/node/vm-017")
	f.Add("spiffe://mesh.example.com/server/1")
	f.Fuzz(func(t *testing.T, text string) {
		id, err := spiffe.Parse(text)
		if err != nil {
			if !errors.Is(err, spiffe.ErrInvalid) || !id.IsZero() {
				t.Fatalf("%q: %+v, %v", text, id, err)
			}
			return
		}
		if id.String() != text {
			t.Fatalf("%q was read as %q", text, id)
		}
		if err := id.Valid(); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		// What others read in the same bytes is what we read.
		u, err := url.Parse(text)
		if err != nil {
			t.Fatalf("%q is no URL: %v", text, err)
		}
		if diff := cmp.Diff(id.URL(), u); diff != "" {
			t.Fatalf("%q as a URL (-ours +theirs):\n%s", text, diff)
		}
		if u.Host != id.TrustDomain || u.EscapedPath() != u.Path || strings.ToLower(text) != text {
			t.Fatalf("%q has several spellings", text)
		}
	})
}
