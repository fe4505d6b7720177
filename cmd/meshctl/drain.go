package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) drainCommand() *cobra.Command {
	var node, reason string
	var w waiter
	c := &cobra.Command{
		Use: "drain NODE|SERVICE/ID", Short: "let a node, or one instance, take no new work", Args: exactly(1, "a node, or SERVICE/ID"),
		Long: `drain lets callers choose other instances; what is running goes on. It lasts,
whatever the agent does, until undrain. Where nothing else is left, calls fail
rather than go to what is drained. --wait returns when every proxy that calls it
sends it nothing new; exit 8 if that is not so in time.`,
		Example: "  meshctl drain vm-017 --reason OPS-77 --wait\n  meshctl drain api/api-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDrain(cmd, args[0], node, w, func(api *client.Client, ref client.Ref) (client.Result, error) {
				return api.Drain(cmd.Context(), ref, client.DrainRequest{Reason: reason})
			})
		},
	}
	c.Flags().StringVar(&node, "node", "", "the node of the instance, where several have one of this name")
	c.Flags().StringVar(&reason, "reason", "", "why, for those who come after you")
	w.flags(c)
	return c
}

func (a *app) undrainCommand() *cobra.Command {
	var node string
	var w waiter
	c := &cobra.Command{
		Use: "undrain NODE|SERVICE/ID", Short: "take back what drain said", Args: exactly(1, "a node, or SERVICE/ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDrain(cmd, args[0], node, w, func(api *client.Client, ref client.Ref) (client.Result, error) {
				return api.Undrain(cmd.Context(), ref)
			})
		},
	}
	c.Flags().StringVar(&node, "node", "", "the node of the instance, where several have one of this name")
	w.flags(c)
	return c
}

func (a *app) changeDrain(cmd *cobra.Command, name, node string, w waiter, change func(*client.Client, client.Ref) (client.Result, error)) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	ref := client.Ref{Kind: client.KindNode, Parts: []string{name}}
	if strings.Contains(name, "/") {
		if ref, err = a.findInstance(cmd, api, name, node); err != nil {
			return err
		}
	} else if node != "" {
		return usage("--node is for an instance, SERVICE/ID; %q is a node", name)
	}
	began := start{callers: true, time: time.Now()}
	if w.on {
		if began.services, err = servicesAt(cmd, api, ref); err != nil {
			return err
		}
	}
	result, err := change(api, ref)
	if err != nil {
		return err
	}
	if err := a.showResult(result); err != nil {
		return err
	}
	return w.wait(cmd.Context(), a, api, result.Position, began)
}

// servicesAt are the services of an instance or of all instances on a node.
func servicesAt(cmd *cobra.Command, api *client.Client, ref client.Ref) ([]catalog.Name, error) {
	if ref.Kind == client.KindInstance {
		return []catalog.Name{{Namespace: ref.Parts[0], Name: ref.Parts[1]}}, nil
	}
	list, err := api.List(cmd.Context(), client.KindInstance, client.Selection{})
	if err != nil {
		return nil, err
	}
	var names []catalog.Name
	for _, i := range list.Items {
		n := catalog.Name{Namespace: i.Ref.Parts[0], Name: i.Ref.Parts[1]}
		if i.Ref.Parts[2] == ref.Parts[0] && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names, nil
}

// findInstance finds SERVICE/ID or NAMESPACE/SERVICE/ID, on the node if one is
// given.
func (a *app) findInstance(cmd *cobra.Command, api *client.Client, name, node string) (client.Ref, error) {
	cut := strings.LastIndexByte(name, '/')
	service, err := a.name(name[:cut])
	if err != nil {
		return client.Ref{}, err
	}
	id := name[cut+1:]
	list, err := api.List(cmd.Context(), client.KindInstance, client.Selection{Namespace: service.Namespace, Prefix: service.Name})
	if err != nil {
		return client.Ref{}, err
	}
	var found []client.Ref
	var on, ids []string
	for _, i := range list.Items {
		p := i.Ref.Parts
		if p[1] != service.Name {
			continue
		}
		ids = append(ids, service.Short()+"/"+p[3])
		if p[3] == id && (node == "" || node == p[2]) {
			found, on = append(found, i.Ref), append(on, p[2])
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return client.Ref{}, usage("%s runs on %s: name one with --node", name, strings.Join(on, ", "))
	}
	text := fmt.Sprintf("instance %s does not exist", name)
	if node != "" {
		text += " on node " + node
	} else if near := catalog.Closest(service.Short()+"/"+id, slices.Compact(ids)); near != "" {
		text += "; did you mean " + near + "?"
	}
	return client.Ref{}, fail(exitNotFound, "%s", text)
}

func (a *app) leaveCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use: "leave [NODE]", Short: "take the instances of a node out of the catalog", Args: cobra.MaximumNArgs(1),
		Long: `leave takes the instances of a node out of the catalog: an agent that stops
deregisters nothing, as it may be an upgrade, and a node that is out of touch is
still called where nothing better is left.

With a name it asks the servers, who refuse it for a node that is connected.
Without one it asks the agent of this host, which leaves and ends; that takes
root, or the agent's user. The proxy stays and finishes what is under way.

The node may come back, and then registers anew; to keep it out, delete it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return a.leaveHere(cmd.Context(), socket)
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			result, err := api.Leave(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(result.Changes) == 0 {
				if _, err := fmt.Fprintf(a.err, "node %s has no instances\n", args[0]); err != nil {
					return err
				}
			}
			return a.showResult(result)
		},
	}
	c.Flags().StringVar(&socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	return c
}

// leaveHere makes the agent of this host leave.
func (a *app) leaveHere(ctx context.Context, socket string) error {
	var left agent.Left
	if err := localCall(ctx, socket, http.MethodPost, "/v1/agent/leave", &left); err != nil {
		return err
	}
	_, err := fmt.Fprintf(a.out, "node %s has left, its agent ends; instances taken out: %d\n", left.Node, left.Instances)
	return err
}

func (a *app) releaseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "release", Short: "let nodes be out of touch that are held back", Args: exactly(0, "no arguments"),
		Long: `release lets nodes be declared out of touch that the servers hold back: when more
than half of all nodes fall silent at once, it is rather the network than the
nodes, and their instances are used as before until they are back, or until you
say that they are really gone.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := a.client()
			if err != nil {
				return err
			}
			released, err := api.ReleaseNodes(cmd.Context())
			if err != nil {
				return err
			}
			if len(released.Nodes) == 0 {
				_, err = fmt.Fprintln(a.err, "no node is held back")
				return err
			}
			_, err = fmt.Fprintf(a.out, "released: %s\n", strings.Join(released.Nodes, ", "))
			return err
		},
	}
}
