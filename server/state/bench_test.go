package state_test

import (
	"fmt"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/state"
)

// BenchmarkCommit measures one commit from Update to the new snapshot, on an
// empty state and on a large one: its cost must not grow with the state.
func BenchmarkCommit(b *testing.B) {
	for _, size := range []struct{ services, instances, intentions int }{{0, 0, 0}, {5_000, 20_000, 10_000}} {
		b.Run(fmt.Sprintf("services=%d,instances=%d,intentions=%d", size.services, size.instances, size.intentions), func(b *testing.B) {
			s, _ := start(b)
			load(b, s, size.services, size.instances, size.intentions)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				update(b, s, func(tx *state.Tx) error {
					return state.InstanceStatuses.Put(tx, instance("vm-1", "svc-1", "bench").Key(),
						catalog.InstanceStatus{Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: "x", Output: fmt.Sprint(i)}}})
				})
			}
		})
	}
}

func BenchmarkPolicy(b *testing.B) {
	s, _ := start(b)
	load(b, s, 5_000, 0, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Snapshot().Policy("mesh.test", catalog.Name{Namespace: "default", Name: "svc-7"}); err != nil {
			b.Fatal(err)
		}
	}
}

func load(b *testing.B, s *state.State, services, instances, count int) {
	b.Helper()
	const chunk = 25
	batch := func(n int, write func(tx *state.Tx, i int) error) {
		for from := 0; from < n; from += chunk {
			update(b, s, func(tx *state.Tx) error {
				for i := from; i < min(from+chunk, n); i++ {
					if err := write(tx, i); err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	batch(services, func(tx *state.Tx, i int) error {
		service := catalog.Service{Namespace: "default", Name: fmt.Sprintf("svc-%d", i), Ports: []catalog.ServicePort{{Name: "http", Protocol: "http"}}}
		return state.Services.Put(tx, service.Ref(), service)
	})
	batch(instances, func(tx *state.Tx, i int) error {
		return put(tx, instance(fmt.Sprintf("vm-%d", i%1000), fmt.Sprintf("svc-%d", i%5000), fmt.Sprintf("i%d", i)))
	})
	batch(count, func(tx *state.Tx, i int) error {
		value := intentions.Intention{Source: fmt.Sprintf("svc-%d", i/5000), Destination: fmt.Sprintf("svc-%d", i%5000), Action: intentions.Allow}
		k, err := value.Key()
		if err != nil {
			return err
		}
		return state.Intentions.Put(tx, k, value)
	})
}
