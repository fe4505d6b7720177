package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) checkCommand() *cobra.Command {
	var local, all bool
	var socket string
	c := &cobra.Command{
		Use: "check", Short: "check this host, or the whole mesh; exit 3 if something is wrong", Args: exactly(0, "no arguments"),
		Long: `check looks for what is wrong, and says what to do about it.

On a host with an agent it asks that agent, which needs neither a token nor a
living server; with --all, or where no agent runs, it asks the servers about the
whole mesh.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			if !local && !all {
				one, err := a.context()
				if err != nil {
					return err
				}
				_, err = os.Stat(socket)
				local = err == nil && a.first(a.addr, "MESH_ADDR", one.address()) == ""
			}
			if local {
				return a.checkLocal(cmd.Context(), socket)
			}
			return a.checkServers(cmd)
		},
	}
	c.Flags().BoolVar(&local, "local", false, "ask the agent of this host")
	c.Flags().BoolVar(&all, "all", false, "ask the servers about the whole mesh")
	c.Flags().StringVar(&socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	c.MarkFlagsMutuallyExclusive("local", "all")
	return c
}

// checkServers looks at the whole mesh from its servers.
func (a *app) checkServers(cmd *cobra.Command) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	st, err := api.Status(cmd.Context())
	if err != nil {
		return err
	}
	r := report{}
	r.add(client.FactOK, "server %s %s, trust domain %s, revision %d", st.Server, st.Version, st.TrustDomain, st.Position.Revision)
	if len(st.Held) > 0 {
		r.add(client.FactFail, "%s", strings.ReplaceAll(heldText(st.Held), "\n", " "))
	}
	nodes, err := api.List(cmd.Context(), client.KindNode, client.Selection{})
	if err != nil {
		return err
	}
	for _, i := range nodes.Items {
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
	}
	for _, p := range st.Proxies {
		if p.Refused != "" {
			r.add(client.FactFail, "proxy %s on node %s refuses its plan: %s", p.Proxy, p.Node, p.Refused)
		}
	}
	services, err := api.List(cmd.Context(), client.KindService, client.Selection{})
	if err != nil {
		return err
	}
	for _, i := range services.Items {
		var spec catalog.Service
		var s client.ServiceStatus
		if err := decode(i, &spec, &s); err != nil {
			return err
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
	return a.showReport(r)
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

func (a *app) showReport(r report) error {
	t := table{columns: []string{"MARK", "FACT"}}
	for _, f := range r.Facts {
		t.rows = append(t.rows, []string{f.Mark, f.Text})
		t.names = append(t.names, f.Text)
	}
	var err error
	if a.format == "table" || a.format == "wide" {
		for _, f := range r.Facts {
			if _, err = fmt.Fprintf(a.out, " %s %s\n", factMarks[f.Mark], f.Text); err != nil {
				return err
			}
		}
	} else {
		err = a.show(t, r)
	}
	if err != nil || !r.Failed {
		return err
	}
	return fail(exitDenied, "")
}
