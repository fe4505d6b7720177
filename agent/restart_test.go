package agent_test

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/proxy/feed"
)

// TestRestartKeepsKeys: an agent that starts passes on the certificates that it has
// on disk, however long it takes to go through many definitions; it takes none from
// its proxy because it does not know yet that they are wanted.
func TestRestartKeepsKeys(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", webDefinition(freePort(t)))
	b.upstreamAPI()
	stop := b.start()
	r, end := b.proxy()
	r.until(b, "the whole plan", full)
	var many strings.Builder
	for i := range 200 {
		fmt.Fprintf(&many, "service \"s%d\" {\n  port = %d\n  check \"beat\" { ttl = \"1h\" }\n}\n", i, 10000+i)
	}
	b.write("services.d/many.hcl", many.String())
	b.status("all are defined", func(s agent.Status) bool { return len(s.Instances) == 201 })
	for range 3 {
		end()
		stop()
		stop = b.start()
		ctx := b.deadline()
		for { // the proxy is there as soon as it can be
			c, err := (&net.Dialer{}).DialContext(ctx, "unix", b.cfg.Proxy.Socket)
			if err == nil {
				_ = c.Close()
				break
			}
			if ctx.Err() != nil {
				t.Fatal(err)
			}
		}
		r, end = b.proxy()
		r.until(b, "the plan", func(u feed.Update) bool { return !u.Alone && len(u.Config.Clusters) == 1 && len(u.Keys) > 0 })
		b.status("the proxy runs it", func(s agent.Status) bool {
			return len(s.Proxies) == 1 && !s.Proxies[0].Applied.IsZero()
		})
		r.mu.Lock()
		if r.bare > 0 {
			t.Errorf("%d of %d updates had no keys", r.bare, r.applies)
		}
		r.mu.Unlock()
	}
}
