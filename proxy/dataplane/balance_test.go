package dataplane_test

import (
	"fmt"
	"math"
	"net/http"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
)

// TestWeightsAndZones sends requests over real connections to three applications, and moves them by plan.
func TestWeightsAndZones(t *testing.T) {
	var apps []string
	for i := range 3 {
		apps = append(apps, serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, i) }))
	}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: apps, intention: allow()})
	c := client(t)
	cluster := &m.a.plan.Clusters[0]
	tests := []struct {
		name       string
		zone       string
		zones      [3]string
		weights    [3]int
		zoneWeight int
		want       [3]float64
	}{
		{"weights", "", [3]string{}, [3]int{1, 2, 5}, 0, [3]float64{.125, .25, .625}},
		{"the same zone", "r1", [3]string{"r1", "r2", ""}, [3]int{}, 1, [3]float64{1, 0, 0}},
		{"half of the zone is gone", "r1", [3]string{"r1", "r2", "r2"}, [3]int{}, 2, [3]float64{.7, .15, .15}},
		{"no zone of one's own", "", [3]string{"r1", "r2", "r2"}, [3]int{}, 0, [3]float64{.333, .333, .333}},
		{"none in the zone", "r9", [3]string{"r1", "r2", "r2"}, [3]int{}, 0, [3]float64{.333, .333, .333}},
	}
	for _, tt := range tests {
		m.a.plan.Zone, cluster.ZoneWeight = tt.zone, tt.zoneWeight
		for i := range cluster.Endpoints {
			cluster.Endpoints[i].Zone, cluster.Endpoints[i].Weight = tt.zones[i], tt.weights[i]
		}
		m.a.apply()
		const n = 1000
		var got [3]float64
		for range n {
			got[get(t, c, "GET", "http://"+m.upstream+"/", "").body[0]-'0'] += 1. / n
		}
		for i := range got {
			if math.Abs(got[i]-tt.want[i]) > .08 { // five standard deviations
				t.Errorf("%s: shares %.3f, want %.3f", tt.name, got, tt.want)
				break
			}
		}
	}
}

// TestANewInstanceStartsSlowly adds one to a service that has one.
func TestANewInstanceStartsSlowly(t *testing.T) {
	var apps []string
	for i := range 2 {
		apps = append(apps, serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, i) }))
	}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: apps, intention: allow()})
	cluster := &m.a.plan.Clusters[0]
	both := cluster.Endpoints
	cluster.Endpoints = both[:1:1]
	m.a.apply()
	c := client(t)
	get(t, c, "GET", "http://"+m.upstream+"/", "")
	cluster.Endpoints = both
	m.a.apply()
	added := time.Now()
	const n = 400
	fresh := 0.
	for range n {
		fresh += float64(get(t, c, "GET", "http://"+m.upstream+"/", "").body[0]-'0') / n
	}
	part := min(max(.1, time.Since(added).Seconds()/10), 1) // at the end of the requests, which take well below a second
	if most := part/(1+part) + .1; fresh == 0 || fresh > most {
		t.Errorf("an instance that is new gets %.3f of the requests, want some, and at most %.3f", fresh, most)
	}
}
