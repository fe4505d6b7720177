package proxy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/meshd/meshd/proxy"
)

func TestServerName(t *testing.T) {
	long := strings.Repeat("a", 63)
	hashed := "h---" + strings.Repeat("a", 52)
	tests := map[string]struct {
		port, instance, service, namespace string
		want                               string // empty: only the properties below are checked
	}{
		"plain":                     {"http", "api-1", "api", "default", "http.api-1.api.default.mesh"},
		"longest labels that fit":   {"http", long, long, long, "http." + long + "." + long + "." + long + ".mesh"},
		"upper case is hashed":      {"http", "API", "api", "default", "http.h---zdsztd3khfk4ehmfre3p4bogsyqxetl7qjog4f3zgabkb6tzrp4q.api.default.mesh"},
		"no label":                  {"http", "10.0.0.1:80", "api", "default", ""},
		"empty":                     {"http", "", "api", "default", ""},
		"dot":                       {"http", "a.b", "api", "default", ""},
		"64 bytes":                  {"http", long + "a", "api", "default", ""},
		"looks like a hash":         {"http", hashed, "api", "default", ""},
		"starts like a hash":        {"http", "h---x", "api", "default", ""},
		"too long in total":         {long, long, long, long, ""},
		"too long, one not a label": {long, long + "!", long, long, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := proxy.ServerName(tt.port, tt.instance, tt.service, tt.namespace)
			if tt.want != "" && got != tt.want {
				t.Errorf("ServerName = %q, want %q", got, tt.want)
			}
			if len(got) > 253 || got != strings.ToLower(got) {
				t.Errorf("ServerName = %q, which is no lower-case DNS name", got)
			}
			target, err := proxy.ParseServerName(got)
			if err != nil {
				t.Errorf("ParseServerName(%q): %v", got, err)
			}
			if tt.want == "" && !strings.Contains(got, "h---") {
				t.Errorf("ServerName = %q, want a hashed label", got)
			}
			if tt.service == "api" && target.Service != "api" {
				t.Errorf("ParseServerName(%q) = %+v", got, target)
			}
		})
	}
}

func TestServerNameIsInjective(t *testing.T) {
	hashOfX := func() string {
		target, err := proxy.ParseServerName(proxy.ServerName("p", "X", "s", "n"))
		if err != nil {
			t.Fatal(err)
		}
		return target.Instance
	}()
	labels := []string{"x", "X", "x.y", "", hashOfX, strings.ToUpper(hashOfX), "h---", "-x", "x-", strings.Repeat("x", 64)}
	seen := map[string][2]string{}
	for _, a := range labels {
		for _, b := range labels {
			name := proxy.ServerName(a, b, "svc", "default")
			if other, ok := seen[name]; ok {
				t.Errorf("%q and %q have one name, %s", other, [2]string{a, b}, name)
			}
			seen[name] = [2]string{a, b}
		}
	}
}

func TestParseServerNameRefuses(t *testing.T) {
	for _, name := range []string{
		"", "mesh", ".mesh", "a.b.c.mesh", "a.b.c.d.e.mesh", "a.b.c.d.mesh.", "a.b.c.d.example", "A.b.c.d.mesh", "a..c.d.mesh",
		"a.b_c.c.d.mesh", "a.-b.c.d.mesh", "h---x.b.c.d.mesh", "h---" + strings.Repeat("1", 52) + ".b.c.d.mesh",
		strings.Repeat("a", 64) + ".b.c.d.mesh", strings.Repeat("a.", 200) + "mesh", "a.b.c.d\x00.mesh",
	} {
		if target, err := proxy.ParseServerName(name); !errors.Is(err, proxy.ErrServerName) {
			t.Errorf("ParseServerName(%q) = %+v, %v, want ErrServerName", name, target, err)
		}
	}
}

func FuzzParseServerName(f *testing.F) {
	f.Add("http.api-1.api.default.mesh")
	f.Add(proxy.ServerName("", "A", "b", "c"))
	f.Fuzz(func(t *testing.T, name string) {
		target, err := proxy.ParseServerName(name)
		if err != nil {
			if !errors.Is(err, proxy.ErrServerName) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if again := strings.Join([]string{target.Port, target.Instance, target.Service, target.Namespace}, ".") + ".mesh"; again != name {
			t.Errorf("%q was read as %+v", name, target)
		}
	})
}

func FuzzServerName(f *testing.F) {
	f.Add("http", "api-1", "api", "default")
	f.Fuzz(func(t *testing.T, port, instance, service, namespace string) {
		name := proxy.ServerName(port, instance, service, namespace)
		if _, err := proxy.ParseServerName(name); err != nil {
			t.Fatal(err)
		}
	})
}
