package balance_test

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshd/meshd/proxy/balance"
)

// eject makes an endpoint fail until it is ejected, and returns for how long.
func eject(t *testing.T, s *balance.State) time.Duration {
	t.Helper()
	return ejectAt(t, s, time.Now())
}

// ejectForLong is for tests that are not about time.
func ejectForLong(t *testing.T, s *balance.State) {
	t.Helper()
	ejectAt(t, s, time.Now().Add(4*time.Minute))
}

func ejectAt(t *testing.T, s *balance.State, now time.Time) time.Duration {
	t.Helper()
	for n := 1; n <= 5; n++ {
		backoff, ejected := s.Fail(now)
		if ejected != (n == 5) {
			t.Fatalf("failure %d: ejected is %v", n, ejected)
		}
		if ejected {
			return backoff
		}
	}
	return 0
}

func TestFailuresMustBeInARow(t *testing.T) {
	s := new(balance.State)
	for range 20 {
		for range 4 {
			if _, ejected := s.Fail(time.Now()); ejected {
				t.Fatal("ejected after 4 failures in a row")
			}
		}
		if s.Succeed(time.Now()) {
			t.Fatal("an endpoint that was never ejected returned")
		}
	}
	eject(t, s)
	if _, again := s.Fail(time.Now()); again || !s.Ejected() {
		t.Errorf("a failure that was under way counted once more: %v, ejected %v", again, s.Ejected())
	}
}

func TestOneProbeDecides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, bad := new(balance.State), new(balance.State)
		p := picker(t, balance.Candidate{State: good}, balance.Candidate{State: bad})
		want := time.Second
		for backoff := eject(t, bad); ; {
			if backoff > want || backoff < want*3/4 {
				t.Fatalf("ejected for %v, want %v less up to a quarter", backoff, want)
			}
			<-time.After(backoff - time.Millisecond)
			probes := func() (n int) {
				for range 1000 {
					n += p.Pick(nil)
				}
				return n
			}
			if n := probes(); n != 0 {
				t.Fatalf("%d picks of an endpoint that is ejected for another millisecond", n)
			}
			<-time.After(2 * time.Millisecond)
			if n := probes(); n != 1 {
				t.Fatalf("%d picks once its time had come, want 1 probe", n)
			}
			if want == 5*time.Minute {
				break
			}
			want = min(2*want, 5*time.Minute)
			ejected := false
			if backoff, ejected = bad.Fail(time.Now()); !ejected {
				t.Fatal("a failed probe did not eject again")
			}
		}
		<-time.After(11 * time.Second)
		if n := p.Pick(nil) + p.Pick(nil) + p.Pick(nil) + p.Pick(nil) + p.Pick(nil) + p.Pick(nil); n != 1 {
			t.Errorf("%d picks after a probe that was never decided, want another 1", n)
		}
		if !bad.Succeed(time.Now()) || bad.Ejected() {
			t.Error("a successful probe did not bring the endpoint back")
		}
		if backoff := eject(t, bad); backoff < 3*time.Minute {
			t.Errorf("it failed right after its return and is ejected for %v only", backoff)
		}
		<-time.After(5 * time.Minute)
		bad.Succeed(time.Now())
		<-time.After(6 * time.Minute)
		if backoff := eject(t, bad); backoff > time.Second {
			t.Errorf("it did well for 6 minutes and is ejected for %v", backoff)
		}
	})
}

func TestAllAreUsedWhenAllAreEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		candidates := []balance.Candidate{weighed(0, 1, false), weighed(0, 1, true), weighed(1, 1, false)}
		p := picker(t, candidates...)
		for i, want := range []int{1, 2, 0} {
			eject(t, candidates[i].State)
			for range 100 {
				if got := p.Pick(nil); got != want {
					t.Fatalf("%d ejected: picked %d, want %d", i+1, got, want)
				}
			}
		}
		var tried []int
		for _, want := range []int{0, 1, 2, -1} {
			got := p.Pick(tried)
			if got != want {
				t.Fatalf("all ejected, tried %v: picked %d, want %d", tried, got, want)
			}
			tried = append(tried, got)
		}
	})
}

func TestAnEjectedZoneSendsAwayWhatItLacks(t *testing.T) {
	tests := map[string]struct {
		weights    []int // nearby
		ejected    int   // of them, the last ones
		zoneWeight int
		want       float64 // that stays
	}{
		"one of four":                     {[]int{1, 1, 1, 1}, 1, 0, 1},
		"two of four":                     {[]int{1, 1, 1, 1}, 2, 0, .7},
		"three of four":                   {[]int{1, 1, 1, 1}, 3, 0, .35},
		"all":                             {[]int{1, 1, 1, 1}, 4, 0, 0},
		"one of two that are left of six": {[]int{1, 1}, 1, 6, 1.4 / 6},
		"the heavy one":                   {[]int{1, 3}, 1, 0, .35},
	}
	for name, tt := range tests {
		candidates := []balance.Candidate{weighed(0, 1, true), weighed(0, 1, true)}
		for _, w := range tt.weights {
			candidates = append(candidates, weighed(0, w, false))
		}
		for i := range tt.ejected {
			ejectForLong(t, candidates[len(candidates)-1-i].State)
		}
		p, err := balance.New("", candidates, tt.zoneWeight)
		if err != nil {
			t.Fatal(err)
		}
		got := shares(t, p, candidates, 20_000, 0)
		if stay := 1 - got[0] - got[1]; math.Abs(stay-tt.want) > .03 {
			t.Errorf("%s: %.3f stay, want %.3f (%.3f)", name, stay, tt.want, got)
		}
		for i := range tt.ejected {
			if got[len(got)-1-i] > .001 {
				t.Errorf("%s: an ejected endpoint got %.3f", name, got[len(got)-1-i])
			}
		}
	}
}

func TestUsableOnesKeepTheirShares(t *testing.T) {
	candidates := []balance.Candidate{weighed(0, 1, false), weighed(0, 4, false), weighed(0, 2, false), weighed(0, 1, false)}
	ejectForLong(t, candidates[1].State)
	p := picker(t, candidates...)
	got := shares(t, p, candidates, 40_000, 0)
	for i, want := range []float64{.25, 0, .5, .25} {
		if math.Abs(got[i]-want) > .02 {
			t.Errorf("shares %.3f, want those of 1, 2 and 1", got)
			break
		}
	}
}

func TestPickAroundEjectedDoesNotAllocate(t *testing.T) {
	candidates := []balance.Candidate{weighed(0, 1, false), weighed(0, 2, false), weighed(0, 3, true), weighed(0, 4, true)}
	for i := range 3 {
		ejectForLong(t, candidates[i].State)
	}
	p := picker(t, candidates...)
	tried := []int{3}
	if n := testing.AllocsPerRun(1000, func() { p.Pick(nil); p.Pick(tried) }); n != 0 {
		t.Errorf("Pick allocates %v times", n)
	}
}

// BenchmarkPickEjected is the price of one dead endpoint, and of many.
func BenchmarkPickEjected(b *testing.B) {
	for name, ejected := range map[string]int{"0": 0, "1": 1, "50": 50} {
		b.Run(name+" of 100", func(b *testing.B) {
			candidates := make([]balance.Candidate, 100)
			for i := range candidates {
				candidates[i] = weighed(0, 1, false)
				for range 5 {
					if i < ejected {
						candidates[i].State.Fail(time.Now().Add(4 * time.Minute))
					}
				}
			}
			p := picker(b, candidates...)
			b.ReportAllocs()
			for b.Loop() {
				p.Pick(nil)
			}
		})
	}
}
