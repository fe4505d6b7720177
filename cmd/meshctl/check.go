package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

// checkFlags say what is to be checked.
type checkFlags struct {
	local, all bool
	node       string
	socket     string
	wait       bool
	limit      time.Duration
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	c := &cobra.Command{
		Use: "check", Short: "check this host, a node, or the whole mesh; exit 3 if something is wrong", Args: exactly(0, "no arguments"),
		Long: `check looks for what is wrong, and says what to do about it.

On a host with an agent it asks that agent, which needs neither a token nor a
living server; with --all, or where no agent runs, it asks the servers about the
whole mesh, with --node about what they know of one node. --wait tries again until
nothing is wrong; what still is when the time is over is shown, with exit 3.`,
		Example: "  sudo meshctl check --wait --timeout 1m\n  meshctl check --node vm-017",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			return a.check(cmd.Context(), f)
		},
	}
	c.Flags().BoolVar(&f.local, "local", false, "ask the agent of this host")
	c.Flags().BoolVar(&f.all, "all", false, "ask the servers about the whole mesh")
	c.Flags().StringVar(&f.node, "node", "", "ask the servers about one node")
	c.Flags().StringVar(&f.socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	c.Flags().BoolVar(&f.wait, "wait", false, "try again until nothing is wrong")
	c.Flags().DurationVar(&f.limit, "timeout", defaultWait, "how long --wait tries")
	exclusive(c, "local", "all", "node")
	_ = c.RegisterFlagCompletionFunc("node", a.complete(client.KindNode)) // the flag was just defined
	return c
}

// check looks once, or until nothing is wrong any more.
func (a *app) check(ctx context.Context, f checkFlags) error {
	if !f.local && !f.all && f.node == "" {
		one, err := a.context()
		if err != nil {
			return err
		}
		_, err = os.Stat(f.socket)
		f.local = err == nil && a.first(a.addr, "MESH_ADDR", one.address()) == ""
	}
	look := func() (report, error) { return localReport(ctx, f.socket) }
	if !f.local {
		api, err := a.client()
		if err != nil {
			return err
		}
		look = func() (report, error) {
			if f.node != "" {
				return nodeReport(ctx, api, f.node)
			}
			return serverReport(ctx, api)
		}
	}
	for end := time.Now().Add(f.limit); ; {
		r, err := look()
		bad := r.Failed || exitCode(err) == exitUnreachable
		if !f.wait || !bad || time.Now().After(end) {
			if err != nil {
				return err
			}
			return a.showReport(r)
		}
		timer := time.NewTimer(pollInterval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// serverReport looks at the whole mesh from its servers.
func serverReport(ctx context.Context, api *client.Client) (report, error) {
	r := report{}
	st, err := api.Status(ctx)
	if err != nil {
		return r, err
	}
	r.add(client.FactOK, "server %s %s, trust domain %s, revision %d", st.Server, st.Version, st.TrustDomain, st.Position.Revision)
	members, err := api.Members(ctx)
	if err != nil {
		return r, err
	}
	r.members(st.Server, members.Members)
	if len(st.Held) > 0 {
		r.add(client.FactFail, "%s", strings.ReplaceAll(heldText(st.Held), "\n", " "))
	}
	nodes, err := api.List(ctx, client.KindNode, client.Selection{})
	if err != nil {
		return r, err
	}
	for _, i := range nodes.Items {
		if err := r.node(i); err != nil {
			return r, err
		}
	}
	r.refusals(st.Proxies)
	services, err := api.List(ctx, client.KindService, client.Selection{})
	if err != nil {
		return r, err
	}
	for _, i := range services.Items {
		var spec catalog.Service
		var s client.ServiceStatus
		if err := decode(i, &spec, &s); err != nil {
			return r, err
		}
		switch {
		case len(spec.Ports) == 0:
			r.add(client.FactOK, "service %s: only calls others; instances: %d", i.Name, s.Instances)
		case s.Instances == 0:
			r.add(client.FactWarn, "service %s has no instance", i.Name)
		case s.Healthy > 0:
			r.add(client.FactOK, "service %s: %d of %d healthy", i.Name, s.Healthy, s.Instances)
		default:
			r.add(client.FactFail, "service %s: none of %d instances is healthy → meshctl instances %s -o wide", i.Name, s.Instances, i.Name)
		}
	}
	return r, nil
}

// nodeReport tells what the servers know of one node.
func nodeReport(ctx context.Context, api *client.Client, name string) (report, error) {
	r := report{}
	item, err := api.Get(ctx, client.Ref{Kind: client.KindNode, Parts: []string{name}})
	if err != nil {
		return r, err
	}
	st, err := api.Status(ctx)
	if err != nil {
		return r, err
	}
	if err := r.node(item); err != nil {
		return r, err
	}
	var spec catalog.Node
	var node client.NodeStatus
	if err := decode(item, &spec, &node); err != nil {
		return r, err
	}
	if slices.Contains(st.Held, name) {
		r.add(client.FactFail, "it is silent and held, as more than half of all nodes are → meshctl node release, once you know that they are gone")
	}
	if node.Version != "" {
		mark := client.FactOK
		if node.Version != st.Version {
			mark = client.FactWarn
		}
		r.add(mark, "agent %s, server %s; mesh address %s", node.Version, st.Version, dash(node.Address))
	}
	if len(spec.Services) == 0 {
		r.add(client.FactWarn, "it may run no service → apply the node with services")
	} else {
		r.add(client.FactOK, "it may run %s", strings.Join(spec.Services, ", "))
	}
	if node.Drain {
		r.add(client.FactWarn, "it is drained → meshctl undrain %s", name)
	}
	proxies := slices.DeleteFunc(st.Proxies, func(p client.ProxyStatus) bool { return p.Node != name })
	for _, p := range proxies {
		if p.Refused == "" {
			r.add(client.FactOK, "proxy %s runs plan %d", p.Proxy, p.Position.Revision)
		}
	}
	r.refusals(proxies)
	if len(proxies) == 0 && node.State == "connected" {
		r.add(client.FactFail, "no proxy has reported → meshctl check on the node, or systemctl status mesh-proxy there")
	}
	return r, r.instancesOn(ctx, api, name)
}

// node tells whether a node is in touch.
func (r *report) node(i client.Item) error {
	var n client.NodeStatus
	if err := json.Unmarshal(i.Status, &n); err != nil {
		return err
	}
	switch n.State {
	case "connected":
		r.add(client.FactOK, "node %s connected, instances: %d", i.Name, n.Instances)
	case "stale":
		r.add(client.FactFail, "node %s out of touch for %s; its instances are used last → meshctl check on the node, or its agent's log", i.Name, since(n.Since))
	case "left":
		r.add(client.FactWarn, "node %s has left, or was out of touch for too long → start its agent, or forget it: meshctl delete node %s", i.Name, i.Name)
	default:
		r.add(client.FactWarn, "node %s has never joined → meshctl token join --node %s", i.Name, i.Name)
	}
	return nil
}

func (r *report) refusals(proxies []client.ProxyStatus) {
	for _, p := range proxies {
		if p.Refused != "" {
			r.add(client.FactFail, "proxy %s on node %s refuses its plan: %s", p.Proxy, p.Node, p.Refused)
		}
	}
}

// instancesOn tells of the health of a node's instances.
func (r *report) instancesOn(ctx context.Context, api *client.Client, node string) error {
	list, err := api.List(ctx, client.KindInstance, client.Selection{})
	if err != nil {
		return err
	}
	for _, i := range list.Items {
		if i.Ref.Parts[2] != node {
			continue
		}
		var st client.InstanceStatus
		if err := decode(i, &catalog.Instance{}, &st); err != nil {
			return err
		}
		mark, text := client.FactOK, fmt.Sprintf("instance %s is %s", i.Name, st.Health)
		switch {
		case !st.Health.Usable():
			mark = client.FactFail
		case st.Health != catalog.HealthPassing, st.Drain:
			mark = client.FactWarn
		}
		if st.Drain {
			text += ", draining"
		}
		for _, c := range st.Checks {
			if c.Health != catalog.HealthPassing {
				text += fmt.Sprintf("; check %s: %s", c.Name, strings.TrimSpace(c.Output))
			}
		}
		r.add(mark, "%s", text)
	}
	return nil
}

// report is what a check found.
type report struct {
	Facts  []client.Fact `json:"facts"`
	Failed bool          `json:"failed"`
}

func (r *report) add(mark, format string, args ...any) {
	r.Facts = append(r.Facts, client.Fact{Mark: mark, Text: fmt.Sprintf(format, args...)})
	r.Failed = r.Failed || mark == client.FactFail
}

// String is the report for people, a line for each fact.
func (r *report) String() string {
	var b strings.Builder
	for _, f := range r.Facts {
		fmt.Fprintf(&b, " %s %s\n", factMarks[f.Mark], f.Text)
	}
	return b.String()
}

func (a *app) showReport(r report) error {
	t := table{columns: []string{"MARK", "FACT"}}
	for _, f := range r.Facts {
		t.rows = append(t.rows, []string{f.Mark, f.Text})
		t.names = append(t.names, f.Text)
	}
	var err error
	if a.format == "table" || a.format == "wide" {
		_, err = fmt.Fprint(a.out, r.String())
	} else {
		err = a.show(t, r)
	}
	if err != nil || !r.Failed {
		return err
	}
	return fail(exitDenied, "")
}
