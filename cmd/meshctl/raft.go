package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server/client"
)

func (a *app) raftCommand() *cobra.Command {
	c := &cobra.Command{Use: "raft", Short: "see and change which servers agree, and who leads", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(
		&cobra.Command{
			Use: "list-peers", Aliases: []string{"list"}, Short: "show the servers as members of the store", Args: exactly(0, "no arguments"),
			RunE: func(cmd *cobra.Command, _ []string) error { return a.raftPeers(cmd.Context()) },
		},
		&cobra.Command{
			Use: "transfer [NAME]", Short: "hand the leadership to another server", Args: func(c *cobra.Command, args []string) error {
				if len(args) > 1 {
					return usage("%s takes at most the name of one server, got %d; see %s --help", command(c), len(args), c.CommandPath())
				}
				return nil
			},
			Long: `transfer has the leader hand over to a server, without a name to the one that is
most up to date. Writes wait for some milliseconds. A leader that is stopped does
so by itself.`,
			ValidArgsFunction: a.completeServers,
			RunE: func(cmd *cobra.Command, args []string) error {
				name := ""
				if len(args) > 0 {
					name = args[0]
				}
				return a.raftTransfer(cmd.Context(), name)
			},
		},
		&cobra.Command{
			Use: "remove NAME", Short: "take a server out of the cluster for good", Args: exactly(1, "the name or ID of a server"),
			Long: `remove takes a server out of the cluster. It may not come back with the state that
it has; stop it first. Dead servers are removed by themselves after a while, and
let in again when they are back. What would leave no majority is refused.`,
			ValidArgsFunction: a.completeServers,
			RunE:              func(cmd *cobra.Command, args []string) error { return a.raftRemove(cmd.Context(), args[0]) },
		},
	)
	return c
}

func (a *app) raftPeers(ctx context.Context) error {
	api, err := a.formatAndClient()
	if err != nil {
		return err
	}
	found, err := api.Members(ctx)
	if err != nil {
		return err
	}
	t := table{columns: []string{"NAME", "ID", "ADDRESS", "ROLE", "ENTRY", "PROBLEM"}}
	for _, m := range found.Members {
		entry := "-"
		if m.Applied > 0 {
			entry = strconv.FormatUint(m.Applied, 10)
		}
		t.names = append(t.names, "member/"+m.Name)
		t.rows = append(t.rows, []string{m.Name, m.ID, dash(m.Address), role(m), entry, dash(m.Problem)})
	}
	return a.show(t, found.Members)
}

func (a *app) raftTransfer(ctx context.Context, name string) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	done, err := api.Transfer(ctx, name)
	if err != nil {
		return err
	}
	text := "the leadership was handed over; the next leader is not known yet: see meshctl members"
	if done.Leader != "" {
		text = done.Leader + " leads"
	}
	_, err = fmt.Fprintln(a.err, text)
	return err
}

func (a *app) raftRemove(ctx context.Context, name string) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	gone, err := api.RemoveServer(ctx, name)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, "removed %s: it may not come back with the state that it has\n", gone.ID)
	return err
}

// role is what a server is in the cluster.
func role(m client.Member) string {
	switch {
	case m.Leader:
		return "leader"
	case m.Voter:
		return "voter"
	default:
		return "non-voter"
	}
}

// completeServers completes the name of a server.
func (a *app) completeServers(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	parent := c.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionWait)
	defer cancel()
	api, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	status, err := api.Status(ctx) // asks no other server
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, m := range status.Members {
		names = append(names, m.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// members tells of the servers beside the one that was asked.
func (r *report) members(asked string, members []client.Member) {
	for _, m := range members {
		switch {
		case m.Problem != "":
			r.add(client.FactFail, "server %s does not answer: %s → its log; if it is gone for good, meshctl operator raft remove %s", m.Name, m.Problem, m.Name)
		case m.State == client.StateDifferent:
			r.add(client.FactFail, "server %s has another state than the leader → stop it, move the folder store in its data_dir away, and start it", m.Name)
		case m.Contact > 0:
			r.add(client.FactFail, "server %s has had no leader for %s → check that the servers reach each other at port 7401", m.Name, m.Contact)
		case !m.Voter:
			r.add(client.FactOK, "server %s %s, has no vote", m.Name, m.Version)
		case m.Name != asked:
			r.add(client.FactOK, "server %s %s", m.Name, m.Version)
		}
	}
	if len(members) > 0 && !slices.ContainsFunc(members, func(m client.Member) bool { return m.Leader }) {
		r.add(client.FactFail, "no server leads: changes wait → start enough servers for a majority")
	}
}
