package balance_test

import (
	"errors"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/balance"
)

func picker(tb testing.TB, candidates ...balance.Candidate) balance.Picker {
	tb.Helper()
	p, err := balance.New("", candidates, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func loaded(tier int, n int) balance.Candidate {
	s := new(balance.State)
	for range n {
		s.Begin()
	}
	return balance.Candidate{State: s, Tier: tier}
}

func TestNewRefusesAnUnknownAlgorithm(t *testing.T) {
	if _, err := balance.New("roulette", nil, 0); !errors.Is(err, balance.ErrAlgorithm) {
		t.Errorf("New(roulette) = %v, want ErrAlgorithm", err)
	}
}

func TestPick(t *testing.T) {
	tests := map[string]struct {
		candidates []balance.Candidate
		tried      []int
		want       map[int]bool
	}{
		"nothing to pick from":            {nil, nil, map[int]bool{-1: true}},
		"one":                             {[]balance.Candidate{loaded(0, 9)}, nil, map[int]bool{0: true}},
		"the less loaded of two":          {[]balance.Candidate{loaded(0, 1), loaded(0, 0)}, nil, map[int]bool{1: true}},
		"stale only while nothing better": {[]balance.Candidate{loaded(1, 0), loaded(0, 50), loaded(1, 0)}, nil, map[int]bool{1: true}},
		"stale when the healthy failed":   {[]balance.Candidate{loaded(1, 0), loaded(0, 0)}, []int{1}, map[int]bool{0: true}},
		"never one that was tried":        {[]balance.Candidate{loaded(0, 0), loaded(0, 5), loaded(0, 6)}, []int{0}, map[int]bool{1: true}},
		"all were tried":                  {[]balance.Candidate{loaded(0, 0), loaded(1, 0)}, []int{1, 0}, map[int]bool{-1: true}},
		"equals share": {
			[]balance.Candidate{loaded(0, 2), loaded(0, 2), loaded(0, 2)},
			nil,
			map[int]bool{0: true, 1: true, 2: true},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := picker(t, tt.candidates...)
			got := map[int]bool{}
			for range 300 {
				got[p.Pick(tt.tried)] = true
			}
			for i := range got {
				if !tt.want[i] {
					t.Errorf("Pick(%v) gave %d, want one of %v", tt.tried, i, tt.want)
				}
			}
			if len(got) != len(tt.want) {
				t.Errorf("300 picks gave %v, want each of %v", got, tt.want)
			}
		})
	}
}

func TestTheMostLoadedGetsNothing(t *testing.T) {
	// With two different choices out of three, the one with the most outstanding always meets a better one.
	p := picker(t, loaded(0, 0), loaded(0, 100), loaded(0, 0))
	for range 1000 {
		if got := p.Pick(nil); got == 1 {
			t.Fatal("Pick gave the most loaded endpoint")
		}
	}
}

func TestRegistryKeepsStatesOverPlans(t *testing.T) {
	key := func(generation, instance string) balance.Key {
		return balance.Key{Generation: generation, Cluster: "default/api:http", Node: "vm-b", Instance: instance}
	}
	first := balance.Registry{}.Next([]balance.Key{key("g1", "a"), key("g1", "b")}, time.Now())
	first.State(key("g1", "a")).Begin()
	second := first.Next([]balance.Key{key("g1", "a"), key("g1", "c")}, time.Now())
	if first.State(key("g1", "a")) != second.State(key("g1", "a")) {
		t.Error("an endpoint that both plans have lost its state")
	}
	if second.State(key("g1", "b")) != nil {
		t.Error("an endpoint that the plan lost kept its state")
	}
	if s := second.State(key("g1", "c")); s == nil || s.Outstanding() != 0 {
		t.Error("a new endpoint has no fresh state")
	}
	restored := second.Next([]balance.Key{key("g2", "a")}, time.Now())
	if restored.State(key("g2", "a")).Outstanding() != 0 {
		t.Error("a new generation took over a state of the old one")
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	p := picker(t, loaded(0, 1), loaded(0, 2), loaded(0, 3), loaded(1, 0))
	tried := []int{0}
	if n := testing.AllocsPerRun(1000, func() { p.Pick(nil); p.Pick(tried) }); n != 0 {
		t.Errorf("Pick allocates %v times", n)
	}
}

func BenchmarkPick(b *testing.B) {
	for name, n := range map[string]int{"5": 5, "1000": 1000} {
		b.Run(name, func(b *testing.B) {
			candidates := make([]balance.Candidate, n)
			for i := range candidates {
				candidates[i] = loaded(0, i%7)
			}
			p := picker(b, candidates...)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					i := p.Pick(nil)
					candidates[i].State.Begin()
					candidates[i].State.End()
				}
			})
		})
	}
}
