package rpc_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// BenchmarkFanOut measures a commit until all agents that it concerns have it: 1,000
// agents with 20 topics each, of which some see the service that changes.
func BenchmarkFanOut(b *testing.B) {
	const agents, services, topics = 1000, 200, 20
	for _, concerned := range []int{0, 10, 1000} {
		b.Run(fmt.Sprintf("agents=%d,topics=%d,concerned=%d", agents, topics, concerned), func(b *testing.B) {
			c := start(b, rpc.Config{JoinRate: 1e6})
			c.intention("*", "*", intentions.Allow)
			for i := range services {
				c.update(func(tx *state.Tx) error {
					for n := range 5 {
						d := catalog.Definition{Name: fmt.Sprintf("svc-%d", i), ID: fmt.Sprintf("i%d", n), Port: 80, Protocol: catalog.ProtocolHTTP}
						instance := d.Instance(fmt.Sprintf("vm-%d", n), "10.0.0.1:7443")
						if err := state.Instances.Put(tx, instance.Key(), instance); err != nil {
							return err
						}
					}
					return nil
				})
			}
			leaves := make([]*ca.Leaf, agents)
			for i := range agents {
				leaves[i] = c.join(fmt.Sprintf("vm-%d", i), "*")
			}
			got := make(chan uint64, agents)
			ctx, cancel := context.WithCancel(context.Background())
			var group sync.WaitGroup
			for i := range agents {
				s := c.dialPipe(leaves[i], "s")
				wanted := make([]*meshpb.Topic, 0, topics)
				for n := range topics {
					name := 1 + (i*7+n)%(services-1)
					if n == 0 && i < concerned {
						name = 0
					}
					wanted = append(wanted, topicUpstream("web", fmt.Sprintf("svc-%d", name)))
				}
				s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: wanted}}}
				<-s.down
				group.Go(func() {
					defer s.cut()
					for {
						select {
						case m := <-s.down:
							if batch := m.GetBatch(); batch != nil {
								select {
								case got <- batch.GetPosition().GetRevision():
								case <-ctx.Done():
									return
								}
							}
						case <-ctx.Done():
							return
						}
					}
				})
			}
			key := catalog.InstanceKey{Service: catalog.Name{Namespace: "default", Name: "svc-0"}, Node: "vm-0", ID: "i0"}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				at := c.update(func(tx *state.Tx) error {
					return state.InstanceStatuses.Put(tx, key, catalog.InstanceStatus{Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: fmt.Sprint(i)}}})
				})
				// What the start of the agents still sends is read away, too.
				for arrived := 0; arrived < concerned; {
					if <-got >= at.Revision {
						arrived++
					}
				}
			}
			b.StopTimer()
			cancel()
			group.Wait()
		})
	}
}
