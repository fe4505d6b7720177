package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) drainCommand() *cobra.Command {
	var node, reason string
	c := &cobra.Command{
		Use: "drain NODE|SERVICE/ID", Short: "let a node, or one instance, take no new work", Args: exactly(1, "a node, or SERVICE/ID"),
		Long: `drain lets callers choose other instances; what is running goes on. It lasts,
whatever the agent does, until undrain. Where nothing else is left, calls fail
rather than go to what is drained.`,
		Example: "  meshctl drain vm-017 --reason OPS-77\n  meshctl drain api/api-2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDrain(cmd, args[0], node, func(api *client.Client, ref client.Ref) (client.Result, error) {
				return api.Drain(cmd.Context(), ref, client.DrainRequest{Reason: reason})
			})
		},
	}
	c.Flags().StringVar(&node, "node", "", "the node of the instance, where several have one of this name")
	c.Flags().StringVar(&reason, "reason", "", "why, for those who come after you")
	return c
}

func (a *app) undrainCommand() *cobra.Command {
	var node string
	c := &cobra.Command{
		Use: "undrain NODE|SERVICE/ID", Short: "take back what drain said", Args: exactly(1, "a node, or SERVICE/ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeDrain(cmd, args[0], node, func(api *client.Client, ref client.Ref) (client.Result, error) {
				return api.Undrain(cmd.Context(), ref)
			})
		},
	}
	c.Flags().StringVar(&node, "node", "", "the node of the instance, where several have one of this name")
	return c
}

func (a *app) changeDrain(cmd *cobra.Command, name, node string, change func(*client.Client, client.Ref) (client.Result, error)) error {
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
	result, err := change(api, ref)
	if err != nil {
		return err
	}
	return a.showResult(result)
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
	return &cobra.Command{
		Use: "leave NODE", Short: "take the instances of a stopped node out of the catalog", Args: exactly(1, "the name of a node"),
		Long: `leave takes the instances of a node that is out of touch out of the catalog: an
agent that stops deregisters nothing, as it may be an upgrade, and a node that is
out of touch is still called where nothing better is left. The node may come
back, and then registers anew; to keep it out, delete it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
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
}
