package conformance_test

import (
	"cmp"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// seeds is how many sequences TestMutations sends, of perSeed inputs each. The
// default takes some seconds; a night takes more.
var seeds = flag.Int("seeds", 6, "how many sequences of mutated requests to send") //nolint:gochecknoglobals // a flag

const perSeed = 60

func TestVectors(t *testing.T) {
	t.Parallel()
	for name, start := range applications() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t, name, start)
			for _, d := range []door{upstream, mesh} {
				// What is cut comes last: it may still reach the application
				// when its client was answered.
				all := vectors()
				slices.SortStableFunc(all, func(a, b vector) int { return cmp.Compare(later(a), later(b)) })
				for _, v := range all {
					t.Run(string(d)+"/"+v.name, func(t *testing.T) { s.expect(t, d, v) })
				}
			}
		})
	}
}

func later(v vector) int {
	if v.short {
		return 1
	}
	return 0
}

// expect sends one vector and compares all that came of it with its row.
func (s *stand) expect(t *testing.T, d door, v vector) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the callee's proxy said:\n%s", s.allowed.log())
		}
	}()
	o := s.try(t, d, v.raw, v.short)
	var seen []string
	for _, sight := range o.sights {
		seen = append(seen, sight.Line)
	}
	if v.preface && d == upstream {
		if len(seen) > 0 || len(o.responses) > 0 || o.err == nil {
			t.Errorf("HTTP/1 behind a preface of HTTP/2: the application saw %q, the client %+v, %v", seen, o.responses, o.err)
		}
		return
	}
	if v.short {
		if slices.ContainsFunc(seen, func(line string) bool { return line != "POST /ok/x" }) {
			t.Errorf("the application saw %q, want POST /ok/x or nothing", seen)
		}
		if len(o.responses) > 1 {
			t.Errorf("%d responses, want one at most: %+v", len(o.responses), o.responses)
		}
		return
	}
	// Nor does it wait for a body that the application did not wait for.
	mayClose := v.mayClose || s.app == early && strings.HasPrefix(v.raw, "POST ") || s.app == early && v.body > 0
	if mayClose && len(o.responses) == 1 && len(seen) < len(v.seen) {
		v.status, v.seen = v.status[:1], v.seen[:len(seen)]
	}
	if diff := gocmp.Diff(v.seen, seen, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the application saw (- want, + got):\n%s", diff)
	}
	var status []int
	for _, r := range o.responses {
		status = append(status, r.status)
	}
	if diff := gocmp.Diff(v.status, status); diff != "" {
		t.Errorf("statuses of the responses (- want, + got):\n%s", diff)
	}
	if o.err != nil {
		t.Errorf("the connection ended in disorder: %v", o.err)
	}
	for i, r := range o.responses {
		if (r.status == 200) != (r.own == "") {
			t.Errorf("response %d has status %d and mesh-error %q", i, r.status, r.own)
		}
	}
	if len(o.sights) > 0 && v.body >= 0 && o.sights[0].Body >= 0 && o.sights[0].Body != v.body {
		t.Errorf("the application saw a body of %d bytes, want %d", o.sights[0].Body, v.body)
	}
}

// TestMutations sends broken pieces of the vectors, the same ones in every
// run, and holds what is true of any input.
func TestMutations(t *testing.T) {
	t.Parallel()
	for name, start := range applications() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStand(t, name, start)
			for seed := range uint64(*seeds) {
				m := newMutator(seed)
				for i := range perSeed {
					raw := m.next()
					if name == "haproxy" && strings.Contains(raw, "websocket") {
						continue // it takes a handshake without its key for no request at all
					}
					d := []door{upstream, mesh}[i%2]
					t.Run(fmt.Sprintf("%d/%d/%s", seed, i, d), func(t *testing.T) {
						s.try(t, d, raw, true)
						if t.Failed() {
							t.Logf("sent %q", raw)
						}
					})
				}
			}
		})
	}
}

// TestOracle shows that each rule finds what it is there for.
func TestOracle(t *testing.T) {
	t.Parallel()
	s := &stand{app: "api"}
	saw := func(lines ...string) (out []sight) {
		for _, line := range lines {
			out = append(out, sight{Line: line, Identity: s.identity()})
		}
		return out
	}
	ok := response{status: 200, seen: "GET /ok/x"}
	for _, row := range []struct {
		name  string
		o     outcome
		wrong int
	}{
		{"all is well", outcome{[]response{ok, ok}, nil, saw("GET /ok/x", "GET /ok/x"), 2}, 0},
		{"nothing was seen", outcome{[]response{{status: 403, own: "denied"}}, nil, nil, 0}, 0},
		{"smuggled", outcome{[]response{ok}, nil, saw("GET /ok/x", "GET /smuggled"), 1}, 3},
		{"no request", outcome{nil, nil, saw(bad + " "), 1}, 2},
		{"not allowed", outcome{[]response{{status: 200, seen: "DELETE /ok/x"}}, nil, saw("DELETE /ok/x"), 1}, 1},
		{"dots", outcome{[]response{{status: 200, seen: "GET /ok/%2e%2e/a"}}, nil, saw("GET /ok/%2e%2e/a"), 1}, 1},
		{"read otherwise", outcome{[]response{ok}, nil, []sight{{Line: "GET /ok/x", Path: "/admin", Identity: s.identity()}}, 1}, 1},
		{"secret", outcome{[]response{{status: 200, seen: "GET /ok/secret"}}, nil, saw("GET /ok/secret"), 1}, 1},
		{"identity", outcome{[]response{ok}, nil, []sight{{Line: "GET /ok/x", Identity: s.identity() + "|" + s.identity()}}, 1}, 1},
		{"forged", outcome{[]response{ok}, nil, []sight{{Line: "GET /ok/x", Identity: s.identity(), Forged: "denied"}}, 1}, 1},
		{"seen twice", outcome{[]response{ok}, nil, saw("GET /ok/x", "GET /ok/x"), 1}, 2},
		{"another's response", outcome{[]response{{status: 200, seen: "GET /ok/y"}}, nil, saw("GET /ok/x"), 1}, 2},
		{"a response too many", outcome{[]response{ok, ok}, nil, saw("GET /ok/x"), 1}, 1},
		{"goes on after a refusal", outcome{[]response{{status: 400, own: "bad-request"}, ok}, nil, saw("GET /ok/x"), 1}, 1},
		{"goes on after close", outcome{[]response{{status: 200, seen: "GET /ok/x", closes: true}, ok}, nil, saw("GET /ok/x", "GET /ok/x"), 2}, 1},
	} {
		if got := s.problems(row.o, false); len(got) != row.wrong {
			t.Errorf("%s: %d problems, want %d: %q", row.name, len(got), row.wrong, got)
		}
	}
}
