package intentions_test

import (
	"errors"
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/meshd/meshd/intentions"
)

func TestNormalizePath(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"/":                     "/",
		"/a":                    "/a",
		"/a/":                   "/a/",
		"//":                    "/",
		"///a//b///":            "/a/b/",
		"/.":                    "/",
		"/./":                   "/",
		"/..":                   "/",
		"/../a":                 "/a",
		"/a/.":                  "/a/",
		"/a/./b":                "/a/b",
		"/a/..":                 "/",
		"/a/../":                "/",
		"/a/b/..":               "/a/",
		"/a/b/../c":             "/a/c",
		"/a/b/../../../../c":    "/c",
		"/a//../b":              "/b",
		"/pub/../admin":         "/admin",
		"/pub/%2e%2e/admin":     "/admin",
		"/pub/%2E./admin":       "/admin",
		"/pub/.%2e//admin":      "/admin",
		"/pub/%2e/admin":        "/pub/admin",
		"/...":                  "/...",
		"/..a":                  "/..a",
		"/.a/..b/c..":           "/.a/..b/c..",
		"/..%20":                "/..%20",
		"/%61%62%63":            "/abc",
		"/%7e%7E~":              "/~~~",
		"/%41-%2d%5f":           "/A--_",
		"/%3a%3A:":              "/%3A%3A:",
		"/a%20b":                "/a%20b",
		"/%25":                  "/%25",
		"/%2541":                "/%2541",
		"/%252e%252e/a":         "/%252e%252e/a",
		"/%252f":                "/%252f",
		"/%3f%23":               "/%3F%23",
		"/caf\u00e9":            "/caf%C3%A9",
		"/caf%c3%a9":            "/caf%C3%A9",
		"/caf\xc3%a9":           "/caf%C3%A9",
		"/%f0%9f%98%80":         "/%F0%9F%98%80",
		"/%ef%bf%bd":            "/%EF%BF%BD",
		"/{a}|b^\"<>[]`":        "/%7Ba%7D%7Cb%5E%22%3C%3E%5B%5D%60",
		"/a;x=1/b;y":            "/a;x=1/b;y",
		"/...;x":                "/...;x",
		"/a..;x":                "/a..;x",
		"/;x":                   "/;x",
		"/!$&'()*+,;=:@-._~aZ9": "/!$&'()*+,;=:@-._~aZ9",
		"/a/%2e%2e%2e/b":        "/a/.../b",
	} {
		got, err := intentions.NormalizePath(in)
		if err != nil || got != want {
			t.Errorf("NormalizePath(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, bad := range []string{
		"", "a", "*", "a/b", "http://a/b", "?", "/a?b", "/a#b", "/a b", "/a\tb", "/a\nb", "/a\x00", "/\x7f", "/a\\b", "\\a",
		"/%", "/%4", "/a%", "/%zz", "/%4g", "/%%41", "/%u0041", "/%-1", "/% 1",
		"/a%2fb", "/a%2Fb", "/a%5cb", "/a%5Cb", "/%00", "/a%00b", "/%0a", "/%0D", "/%1f", "/%7f", "/%7F", "/%09",
		"/..;x", "/..;", "/.;", "/a/..;x/b", "/a/.;/b", "/%2e%2e;x", "/%2e;/a", "/..%3bx", "/..%3B", "/%2e%2E%3B/a", "/.%2e;a",
		"/\xff", "/%ff", "/\xc3", "/%c3", "/%c3a", "/%c3/", "/%c3%41", "/\xa9", "/%a9",
		"/%c0%ae%c0%ae/", "/%c0%af", "/%c1%9c", "/%e0%80%af", "/%f0%80%80%af", "/%ed%a0%80", "/%f4%90%80%80", "/%f8%88%80%80%80",
		"/\xc0\xae", "/%c0\xae", "/%e2%82", "/%e2%82a%ac",
	} {
		if got, err := intentions.NormalizePath(bad); !errors.Is(err, intentions.ErrTarget) || got != "" {
			t.Errorf("NormalizePath(%q) = %q, %v, want ErrTarget", bad, got, err)
		}
	}
}

func TestNormalizeTarget(t *testing.T) {
	t.Parallel()
	for in, want := range map[string][2]string{
		"/":             {"/", ""},
		"/?":            {"/", "?"},
		"/a/../b?c=/..": {"/b", "?c=/.."},
		"/a?b?c%00%zz":  {"/a", "?b?c%00%zz"},
		"/%61?%61":      {"/a", "?%61"},
		"/a?\u00e9":     {"/a", "?\u00e9"},
	} {
		p, q, err := intentions.NormalizeTarget(in)
		if err != nil || p != want[0] || q != want[1] {
			t.Errorf("NormalizeTarget(%q) = %q, %q, %v", in, p, q, err)
		}
	}
	for _, bad := range []string{"", "?", "a?b", "/a?b c", "/a?b#c", "/a#b?c", "/a?\x00", "/a?\r\nX: y", "/a?\x7f", "/a%2f?b"} {
		if p, q, err := intentions.NormalizeTarget(bad); !errors.Is(err, intentions.ErrTarget) {
			t.Errorf("NormalizeTarget(%q) = %q, %q, %v, want ErrTarget", bad, p, q, err)
		}
	}
}

func TestNormalizeHost(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"api":                    "api",
		"API":                    "api",
		"api.":                   "api",
		"Api.Default.Mesh.:8080": "api.default.mesh",
		"my_app:1":               "my_app",
		"10.0.0.1:80":            "10.0.0.1",
		"[::1]":                  "[::1]",
		"[::1]:443":              "[::1]",
		"[0:0:0:0:0:0:0:1]":      "[::1]",
		"[FD00::A]:65535":        "[fd00::a]",
		"[::ffff:10.0.0.1]":      "[::ffff:10.0.0.1]",
		"a-.b":                   "a-.b",
		strings.Repeat("a", 253): strings.Repeat("a", 253),
	} {
		got, err := intentions.NormalizeHost(in)
		if err != nil || got != want {
			t.Errorf("NormalizeHost(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, bad := range []string{
		"", ".", "..", "a..", "a..b", ".a", ":80", "a:", "a:0", "a:65536", "a:+1", "a:1x", "a:b:1", "::1", "a,b", "a b", "a/b", "a\\b", "u@a",
		"a%41", "a?b", "a#b", "caf\u00e9", "a\x00", "a\n", "[::1", "[]", "[::1]x", "[::1]:", "[::1]:0", "[::1%25eth0]", "[::1%eth0]", "[10.0.0.1]", "[a]", "*",
		strings.Repeat("a", 254), "a:000000080000000000",
	} {
		if got, err := intentions.NormalizeHost(bad); !errors.Is(err, intentions.ErrTarget) || got != "" {
			t.Errorf("NormalizeHost(%q) = %q, %v, want ErrTarget", bad, got, err)
		}
	}
}

// AllocsPerRun counts what all goroutines do, so this one runs alone.
func TestNormalizeDoesNotAllocate(t *testing.T) {
	for _, p := range []string{"/", "/v1/jobs/4711", "/a%20b/caf%C3%A9;x=1/..a/%2541", strings.Repeat("/segment", 200)} {
		if n := testing.AllocsPerRun(100, func() {
			if got, query, err := intentions.NormalizeTarget(p + "?q"[:0]); err != nil || got != p || query != "" {
				panic(got)
			}
		}); n != 0 {
			t.Errorf("path %.40q: %v allocations", p, n)
		}
	}
	for _, h := range []string{"api.default.mesh", "api.default.mesh.:8080", "[::1]:443", "[fd00::a]"} {
		if n := testing.AllocsPerRun(100, func() {
			if _, err := intentions.NormalizeHost(h); err != nil {
				panic(err)
			}
		}); n != 0 {
			t.Errorf("host %q: %v allocations", h, n)
		}
	}
}

// FuzzNormalizeTarget: what is forwarded is stable, and an application that
// parses it, by net/url and package path, sees the path that was authorized and
// the one that the client meant.
func FuzzNormalizeTarget(f *testing.F) {
	for _, s := range []string{
		"/a/../b?c", "//%2e%2e/%61", "/%c3%a9;x/.", "/a;b/..", "/%2541%25", "/..%3b", "/{a}?x=[]", "/a%2Fb", "/\xff", "/%e2%82%ac/",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		p, q, err := intentions.NormalizeTarget(target)
		if err != nil {
			if !errors.Is(err, intentions.ErrTarget) || p != "" && q != "" {
				t.Errorf("error %v with %q, %q", err, p, q)
			}
			return
		}
		if again, err := intentions.NormalizePath(p); err != nil || again != p {
			t.Fatalf("%q → %q → %q, %v: not stable", target, p, again, err)
		}
		if p2, q2, err := intentions.NormalizeTarget(p + q); err != nil || p2 != p || q2 != q {
			t.Fatalf("%q: forwarded as %q, read as %q, %q, %v", target, p+q, p2, q2, err)
		}
		if !strings.HasSuffix(target, q) {
			t.Fatalf("%q: query changed to %q", target, q)
		}
		u, err := url.ParseRequestURI(p)
		if err != nil || u.EscapedPath() != p && u.String() != p {
			t.Fatalf("%q: the application reads %q as %v, %v", target, p, u, err)
		}
		if clean(u.Path) != u.Path {
			t.Fatalf("%q → %q: the application cleans %q to %q", target, p, u.Path, clean(u.Path))
		}
		meant, err := url.PathUnescape(strings.TrimSuffix(target, q))
		if err != nil || strings.TrimSuffix(clean(meant), "/") != strings.TrimSuffix(u.Path, "/") {
			t.Fatalf("%q means %q, %v, and became %q", target, clean(meant), err, u.Path)
		}
		if strings.ContainsAny(u.Path, "\x00\\\n\r") || strings.Contains(u.Path, "/..;") || strings.Contains(u.Path, "/.;") {
			t.Fatalf("%q → %q lets %q through", target, p, u.Path)
		}
	})
}

// clean is path.Clean that keeps a final slash.
func clean(p string) string {
	c := path.Clean(p)
	if c != "/" && (strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || strings.HasSuffix(p, "/..")) {
		c += "/"
	}
	return c
}

// FuzzNormalizeHost: what was authorized is stable and is what net/url sees.
func FuzzNormalizeHost(f *testing.F) {
	for _, s := range []string{"API.:80", "[FD00::1]:1", "a_b", "1.2.3.4", "a..b", "[::ffff:1.2.3.4]", "x:y", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		h, err := intentions.NormalizeHost(host)
		if err != nil {
			return
		}
		if again, err := intentions.NormalizeHost(h); err != nil || again != h {
			t.Fatalf("%q → %q → %q, %v: not stable", host, h, again, err)
		}
		u, err := url.Parse("http://" + host + "/")
		if err != nil {
			t.Fatalf("%q → %q, but net/url says %v", host, h, err)
		}
		if !strings.Contains(host, "[") && strings.TrimSuffix(strings.ToLower(u.Hostname()), ".") != h {
			t.Fatalf("%q → %q, but net/url sees %q", host, h, u.Hostname())
		}
	})
}

func BenchmarkNormalizeTarget(b *testing.B) {
	for name, target := range map[string]string{
		"normal":  "/v1/jobs/4711?verbose=1",
		"encoded": "/v1/caf%C3%A9/a%20b?verbose=1",
		"rewrite": "/v1/./jobs//%34711?verbose=1",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := intentions.NormalizeTarget(target); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
