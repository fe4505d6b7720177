package balance_test

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshd/meshd/proxy/balance"
)

// TestSlowStart has one endpoint from the start, and one that a later plan brings.
func TestSlowStart(t *testing.T) {
	tests := map[string]struct {
		weights [2]int
		busy    int
		want    map[time.Duration]float64 // share of the new one, by its age
	}{
		"equals": {[2]int{1, 1}, 0, map[time.Duration]float64{
			0: .1 / 1.1, time.Second: .1 / 1.1, 5 * time.Second: .5 / 1.5, 9 * time.Second: .9 / 1.9, 10 * time.Second: .5,
		}},
		"three times as heavy": {[2]int{1, 3}, 0, map[time.Duration]float64{0: .3 / 1.3, 5 * time.Second: 1.5 / 2.5, 10 * time.Second: .75}},
		"under load":           {[2]int{1, 1}, 300, map[time.Duration]float64{0: .1 / 1.1, 5 * time.Second: .5 / 1.5, 10 * time.Second: .5}},
	}
	for name, tt := range tests {
		for age, want := range tt.want {
			synctest.Test(t, func(t *testing.T) {
				old, fresh := balance.Key{Cluster: "api", Instance: "old"}, balance.Key{Cluster: "api", Instance: "new"}
				first := balance.Registry{}.Next([]balance.Key{old}, time.Now())
				second := first.Next([]balance.Key{old, fresh}, time.Now())
				<-time.After(age)
				candidates := []balance.Candidate{
					{State: second.State(old), Weight: tt.weights[0]}, {State: second.State(fresh), Weight: tt.weights[1]},
				}
				p := picker(t, candidates...)
				if got := shares(t, p, candidates, 40_000, tt.busy); math.Abs(got[1]-want) > .02 {
					t.Errorf("%s after %v: the new one gets %.3f, want %.3f", name, age, got[1], want)
				}
			})
		}
	}
}

func TestNobodyIsSlowAlone(t *testing.T) {
	a, b := balance.Key{Cluster: "api", Instance: "a"}, balance.Key{Cluster: "api", Instance: "b"}
	other := balance.Key{Cluster: "db", Instance: "db"}
	tests := map[string]struct {
		before []balance.Key
	}{
		"a new cluster":        {[]balance.Key{other}},
		"both are replacement": {[]balance.Key{{Cluster: "api", Instance: "gone"}}},
	}
	for name, tt := range tests {
		r := balance.Registry{}.Next(tt.before, time.Now()).Next([]balance.Key{a, b}, time.Now())
		candidates := []balance.Candidate{{State: r.State(a)}, {State: r.State(b)}}
		if got := shares(t, picker(t, candidates...), candidates, 20_000, 0); math.Abs(got[0]-.5) > .03 {
			t.Errorf("%s: shares %.3f, want halves", name, got)
		}
	}
}

func TestAnEndpointThatIsBackStartsSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		candidates := []balance.Candidate{weighed(0, 1, false), weighed(0, 1, false)}
		p := picker(t, candidates...)
		<-time.After(eject(t, candidates[1].State))
		candidates[1].State.Succeed(time.Now())
		if got := shares(t, p, candidates, 40_000, 0); math.Abs(got[1]-.1/1.1) > .02 {
			t.Errorf("right after its return it gets %.3f, want a tenth of its share", got[1])
		}
		<-time.After(10 * time.Second)
		if got := shares(t, p, candidates, 40_000, 0); math.Abs(got[1]-.5) > .02 {
			t.Errorf("10 s after its return it gets %.3f, want half", got[1])
		}
	})
}

func TestPickAmongColdDoesNotAllocate(t *testing.T) {
	before := balance.Registry{}.Next([]balance.Key{{Instance: "gone"}}, time.Now())
	keys := []balance.Key{{Instance: "a"}, {Instance: "b"}, {Instance: "c"}}
	r := before.Next(keys, time.Now())
	p := picker(t, balance.Candidate{State: r.State(keys[0])}, balance.Candidate{State: r.State(keys[1])}, balance.Candidate{State: r.State(keys[2])})
	tried := []int{1}
	if n := testing.AllocsPerRun(1000, func() { p.Pick(nil); p.Pick(tried) }); n != 0 {
		t.Errorf("Pick allocates %v times", n)
	}
}
