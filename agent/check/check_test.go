package check_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/meshd/meshd/agent/check"
	"github.com/meshd/meshd/catalog"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const web = "default/web/web"

func run(t *testing.T, cfg check.Config, checks ...catalog.Check) *check.Group {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	g := check.New(cfg)
	g.Set(map[string][]catalog.Check{web: checks})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return g
}

// until waits for a state of the first check that fits.
func until(t *testing.T, g *check.Group, want func(check.State) bool) check.State {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		changed := g.Changed()
		if s := g.States(web); len(s) > 0 && want(s[0]) {
			return s[0]
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the state never fitted; now %+v", g.States(web))
		}
	}
}

func ran(s check.State) bool { return !s.Ran.IsZero() }

func second() catalog.Duration { return catalog.Duration(time.Second) }

func TestHTTPAgainstARealServer(t *testing.T) {
	t.Parallel()
	mux := http.NewServeMux()
	for _, code := range []int{200, 204, 301, 404, 429, 500, 503} {
		mux.HandleFunc(fmt.Sprintf("/%d", code), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/200")
			w.WriteHeader(code)
		})
	}
	mux.HandleFunc("/seen", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s %s", r.Method, r.Host, r.Header.Get("X-Probe"))
	})
	mux.HandleFunc("/huge", func(w http.ResponseWriter, _ *http.Request) {
		for range 1000 {
			if _, err := w.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)

	rows := []struct {
		path   string
		edit   func(*catalog.Check)
		health catalog.Health
		output string
	}{
		{path: "/200", health: catalog.HealthPassing, output: ": 200 OK"},
		{path: "/204", health: catalog.HealthPassing, output: ": 204 No Content"},
		{path: "/301", health: catalog.HealthCritical, output: ": 301 Moved Permanently"},
		{path: "/404", health: catalog.HealthCritical, output: ": 404 Not Found"},
		{path: "/429", health: catalog.HealthWarning, output: ": 429 Too Many Requests"},
		{path: "/500", health: catalog.HealthCritical, output: ": 500 Internal Server Error"},
		{path: "/503", health: catalog.HealthCritical, output: ": 503 Service Unavailable"},
		{path: "/huge", health: catalog.HealthPassing, output: ": 200 OK"},
		{path: "/seen", health: catalog.HealthPassing, output: "POST web.internal yes", edit: func(c *catalog.Check) {
			c.Method, c.Header = "POST", map[string][]string{"host": {"web.internal"}, "x-probe": {"yes"}}
		}},
		{path: "/slow", health: catalog.HealthCritical, output: "no answer within 50ms", edit: func(c *catalog.Check) {
			c.Timeout = catalog.Duration(50 * time.Millisecond)
		}},
	}
	for _, row := range rows {
		t.Run(row.path, func(t *testing.T) {
			t.Parallel()
			c := catalog.Check{Name: "alive", HTTP: srv.URL + row.path, Interval: second()}
			if row.edit != nil {
				row.edit(&c)
			}
			s := until(t, run(t, check.Config{}, c), ran)
			if s.Health != row.health || !strings.Contains(s.Output, row.output) {
				t.Errorf("got %s %q, want %s and %q", s.Health, s.Output, row.health, row.output)
			}
			if len(s.Output) > check.MaxOutput {
				t.Errorf("%d bytes of output were kept", len(s.Output))
			}
		})
	}
}

func TestTCPAgainstARealListener(t *testing.T) {
	t.Parallel()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := run(t, check.Config{}, catalog.Check{Name: "port", TCP: l.Addr().String(), Interval: second()})
	s := until(t, g, ran)
	if s.Health != catalog.HealthPassing || s.Output != "TCP connect "+l.Addr().String()+": success" {
		t.Errorf("got %s %q", s.Health, s.Output)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s = until(t, g, func(s check.State) bool { return s.Health == catalog.HealthCritical })
	if !strings.Contains(s.Output, "connection refused") {
		t.Errorf("output %q does not say the cause", s.Output)
	}
}

type resolver map[string][]string

func (r resolver) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, a := range r[host] {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	return addrs, nil
}

func TestForbiddenAddresses(t *testing.T) {
	t.Parallel()
	names := resolver{
		"metadata.internal": {"169.254.169.254"},
		"rebind.internal":   {"127.0.0.1", "169.254.169.254"},
		"mapped.internal":   {"::ffff:169.254.169.254"},
		"nowhere.internal":  nil,
	}
	rows := []struct{ target, want string }{
		{"http://169.254.169.254/latest/meta-data/", "169.254.169.254: checks must not reach this address"},
		{"http://[fe80::1%25lo]/", "checks must not reach this address"},
		{"http://[fd00:ec2::254]/", "checks must not reach this address"},
		{"http://[::ffff:a9fe:a9fe]/", "169.254.169.254: checks must not reach this address"},
		{"http://100.100.100.200/", "checks must not reach this address"},
		{"http://metadata.internal/", "metadata.internal is 169.254.169.254: checks must not reach this address"},
		{"http://rebind.internal/", "checks must not reach this address"},
		{"http://mapped.internal/", "checks must not reach this address"},
		{"http://nowhere.internal/", "resolve nowhere.internal: no address"},
	}
	for _, row := range rows {
		t.Run(row.target, func(t *testing.T) {
			t.Parallel()
			g := run(t, check.Config{Resolver: names}, catalog.Check{Name: "x", HTTP: row.target, Interval: second()})
			s := until(t, g, ran)
			if s.Health != catalog.HealthCritical || !strings.Contains(s.Output, row.want) {
				t.Errorf("got %s %q, want critical and %q", s.Health, s.Output, row.want)
			}
		})
	}
}

// scripted answers each request with the next status code that the test sends.
type scripted chan int

func (s scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case code := <-s:
		w.WriteHeader(code)
	case <-r.Context().Done():
	}
}

func TestThresholds(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name      string
		c         catalog.Check
		codes     []int
		want      string // the verdicts after each run: p, w or c
		startWith catalog.Health
	}{
		{name: "defaults", codes: []int{200, 500, 200}, want: "pcp"},
		{name: "initially critical", codes: []int{500}, want: "c"},
		{name: "success before passing", c: catalog.Check{SuccessBeforePassing: 3}, codes: []int{200, 200, 500, 200, 200, 200}, want: "cccccp"},
		{name: "a warning counts as success", c: catalog.Check{SuccessBeforePassing: 2}, codes: []int{429, 200, 429}, want: "cpw"},
		{name: "failures before critical", c: catalog.Check{FailuresBeforeCritical: 3}, codes: []int{200, 500, 500, 200, 500, 500, 500}, want: "ppppppc"},
		{
			name:  "warning first",
			c:     catalog.Check{FailuresBeforeWarning: 2, FailuresBeforeCritical: 3},
			codes: []int{200, 500, 500, 500, 500}, want: "ppwcc",
		},
		{
			name:  "a check that never passed gets no warning",
			c:     catalog.Check{FailuresBeforeWarning: 1, FailuresBeforeCritical: 3},
			codes: []int{500, 500, 500}, want: "ccc",
		},
		{name: "an earlier verdict is kept", c: catalog.Check{SuccessBeforePassing: 2}, codes: []int{200, 500}, want: "pc", startWith: catalog.HealthPassing},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			answers := make(scripted)
			srv := httptest.NewServer(answers)
			t.Cleanup(srv.Close)
			c := row.c
			c.Name, c.HTTP = "alive", srv.URL
			// Below the minimum that Validate allows: the runner does not mind.
			c.Interval = catalog.Duration(5 * time.Millisecond)
			cfg := check.Config{}
			if row.startWith != "" {
				cfg.Earlier = map[string][]check.State{web: {{Name: "alive", Kind: catalog.CheckHTTP, Health: row.startWith}}}
			}
			var got strings.Builder
			g := run(t, cfg, c)
			last := time.Time{}
			for _, code := range row.codes {
				answers <- code
				s := until(t, g, func(s check.State) bool { return s.Ran.After(last) })
				last = s.Ran
				got.WriteByte(string(s.Health)[0])
			}
			if got.String() != row.want {
				t.Errorf("verdicts %q, want %q", got.String(), row.want)
			}
		})
	}
}

func TestTTL(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := catalog.Check{Name: "beat", TTL: catalog.Duration(10 * time.Second)}
		g := run(t, check.Config{}, c)
		step := func(after time.Duration, report catalog.Health, want catalog.Health, output string) {
			t.Helper()
			<-time.After(after)
			if report != "" {
				if err := g.Report(web, "beat", report, "said "+string(report)); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			if s := g.States(web)[0]; s.Health != want || !strings.Contains(s.Reason, output) {
				t.Errorf("at %v: %s %q, want %s %q", time.Now(), s.Health, s.Reason, want, output)
			}
		}
		step(30*time.Second, "", catalog.HealthCritical, "not checked yet")
		step(0, catalog.HealthPassing, catalog.HealthPassing, "said passing")
		step(9*time.Second, catalog.HealthPassing, catalog.HealthPassing, "said passing")
		step(9*time.Second, "", catalog.HealthPassing, "said passing")
		step(time.Second, "", catalog.HealthCritical, "no report within 10s; the last one said: said passing")
		step(time.Hour, catalog.HealthWarning, catalog.HealthWarning, "said warning")
		step(time.Second, catalog.HealthCritical, catalog.HealthCritical, "said critical")
		g.Set(nil)
		synctest.Wait()
		if err := g.Report(web, "beat", catalog.HealthPassing, ""); !errors.Is(err, check.ErrNoCheck) {
			t.Errorf("a report to a removed check: %v", err)
		}
	})
}

func TestRestartKeepsVerdicts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := catalog.Check{Name: "beat", TTL: catalog.Duration(10 * time.Second)}
		first := check.New(check.Config{Log: slog.New(slog.DiscardHandler)})
		first.Set(map[string][]catalog.Check{web: {c}, "default/none/none": nil})
		if err := first.Report(web, "beat", catalog.HealthPassing, "fine"); err != nil {
			t.Fatal(err)
		}
		since := time.Now()
		<-time.After(time.Minute) // the agent is down
		g := run(t, check.Config{Earlier: first.All()}, c)
		synctest.Wait()
		want := []check.State{{
			Name: "beat", Kind: catalog.CheckTTL, Health: catalog.HealthPassing, Since: since,
			Reason: "fine", Output: "fine", Ran: since,
		}}
		if diff := cmp.Diff(want, g.States(web)); diff != "" {
			t.Errorf("after the restart: %s", diff)
		}
		<-time.After(10 * time.Second)
		synctest.Wait()
		if s := g.States(web)[0]; s.Health != catalog.HealthCritical {
			t.Errorf("one TTL after the restart without a report: %s", s.Health)
		}
	})
}

func TestFirstRunsAreSpread(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const n, interval = 64, 10 * time.Second
		var checks []catalog.Check
		for i := range n {
			// A forbidden target: no descriptor is opened, the fake clock stays.
			checks = append(checks, catalog.Check{
				Name: fmt.Sprint(i), TCP: "169.254.169.254:80", Interval: catalog.Duration(interval),
			})
		}
		start := time.Now()
		g := run(t, check.Config{}, checks...)
		<-time.After(interval)
		synctest.Wait()
		early, at := 0, map[time.Time]bool{}
		for _, s := range g.States(web) {
			if s.Ran.IsZero() || s.Ran.Sub(start) > interval {
				t.Fatalf("check %s first ran at %v", s.Name, s.Ran)
			}
			at[s.Ran] = true
			if s.Ran.Sub(start) < interval/2 {
				early++
			}
		}
		if early < n/8 || early > n-n/8 || len(at) < n/2 {
			t.Errorf("%d of %d ran in the first half, at %d different moments", early, n, len(at))
		}
	})
}

func TestSetKeepsWhatIsUnchanged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := catalog.Check{Name: "a", TTL: catalog.Duration(time.Minute)}
		b := catalog.Check{Name: "b", TTL: catalog.Duration(time.Minute)}
		g := run(t, check.Config{}, a, b)
		for _, name := range []string{"a", "b"} {
			if err := g.Report(web, name, catalog.HealthPassing, "ok"); err != nil {
				t.Fatal(err)
			}
		}
		changed := g.Changed()
		g.Set(map[string][]catalog.Check{web: {a, b}})
		select {
		case <-changed:
			t.Error("setting the same checks is no change")
		default:
		}
		b.TTL = catalog.Duration(2 * time.Second)
		g.Set(map[string][]catalog.Check{web: {b, a}})
		<-time.After(3 * time.Second)
		synctest.Wait()
		got := map[string]catalog.Health{}
		var order []string
		for _, s := range g.States(web) {
			got[s.Name], order = s.Health, append(order, s.Name)
		}
		want := map[string]catalog.Health{"a": catalog.HealthPassing, "b": catalog.HealthCritical}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"b", "a"}, order); diff != "" {
			t.Error(diff)
		}
	})
}

func TestReportIsRefused(t *testing.T) {
	t.Parallel()
	g := check.New(check.Config{Log: slog.New(slog.DiscardHandler)})
	g.Set(map[string][]catalog.Check{web: {{Name: "port", TCP: "127.0.0.1:1", Interval: second()}}})
	rows := []struct {
		instance, check string
		health          catalog.Health
		want            error
	}{
		{web, "port", catalog.HealthPassing, check.ErrNotTTL},
		{web, "none", catalog.HealthPassing, check.ErrNoCheck},
		{"default/x/x", "port", catalog.HealthPassing, check.ErrNoCheck},
		{web, "port", "fine", check.ErrHealth},
		{web, "port", catalog.HealthUnknown, check.ErrHealth},
	}
	for _, row := range rows {
		if err := g.Report(row.instance, row.check, row.health, ""); !errors.Is(err, row.want) {
			t.Errorf("%+v: %v", row, err)
		}
	}
}

func TestOutputIsClipped(t *testing.T) {
	t.Parallel()
	g := check.New(check.Config{Log: slog.New(slog.DiscardHandler)})
	g.Set(map[string][]catalog.Check{web: {{Name: "beat", TTL: second()}}})
	rows := []struct{ in, want string }{
		{"a\x00b\x1b[31mc\nd\te\u0085f", "ab[31mc\nd\tef"},
		{"bad \xff utf-8", "bad \uFFFD utf-8"},
		{strings.Repeat("ä", check.MaxOutput), strings.Repeat("ä", check.MaxOutput/2)},
		{"x" + strings.Repeat("ä", check.MaxOutput), "x" + strings.Repeat("ä", check.MaxOutput/2-1)},
	}
	for _, row := range rows {
		if err := g.Report(web, "beat", catalog.HealthPassing, row.in); err != nil {
			t.Fatal(err)
		}
		if got := g.States(web)[0].Output; got != row.want {
			t.Errorf("%.20q became %.20q (%d bytes), want %.20q", row.in, got, len(got), row.want)
		}
	}
}
