package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/server/client"
)

func (a *app) proxyCommand() *cobra.Command {
	c := &cobra.Command{Use: "proxy", Short: "the proxies of the mesh", RunE: group, Args: cobra.ArbitraryArgs}
	var watch, local bool
	var socket string
	status := &cobra.Command{
		Use: "status", Short: "show what each proxy runs; exit 3 if one refuses its plan", Args: exactly(0, "no arguments"),
		Long: `status shows what each proxy last reported to the server that answers: the
revision of the newest input of the plan that it runs, which changes only when
something that concerns it does, and whether it refused a newer one.

With --local it asks the agent of this host, and shows each process: after a
restart one that serves, and those that drain, with the connections that they have
left and when these are cut.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if local {
				if err := a.checkFormat(); err != nil {
					return err
				}
				return a.localProxies(cmd.Context(), socket, watch)
			}
			api, err := a.formatAndClient()
			if err != nil {
				return err
			}
			read := func() (client.Status, table, error) {
				st, err := api.Status(cmd.Context())
				return st, proxyTable(st.Proxies), err
			}
			if watch {
				return a.poll(cmd.Context(), func() (table, []any, error) {
					st, t, err := read()
					return t, anys(st.Proxies), err
				})
			}
			st, t, err := read()
			if err != nil {
				return err
			}
			if err := a.show(t, st.Proxies); err != nil || !refuses(st.Proxies) {
				return err
			}
			return fail(exitDenied, "")
		},
	}
	watchFlag(status, &watch)
	status.Flags().BoolVar(&local, "local", false, "ask the agent of this host about its processes")
	status.Flags().StringVar(&socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	c.AddCommand(status, a.proxyRestartCommand())
	return c
}

func watchFlag(c *cobra.Command, watch *bool) {
	c.Flags().BoolVarP(watch, "watch", "w", false, "show what there is and then every change, until interrupted")
}

func (a *app) membersCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use: "members", Aliases: []string{"member"}, Short: "show the servers of the mesh", Args: exactly(0, "no arguments"),
		Long: `members shows the servers of the mesh, each of which is asked for what it knows of
itself. STATE is "ok", or says that a server does not answer, has no leader, or
has another state than the leader. It also tells when nodes are held: more than
half of all fell silent at once, and none of them is declared out of touch until
they are back or "meshctl node release" says that they are gone.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.members(cmd, watch) },
	}
	watchFlag(c, &watch)
	return c
}

func (a *app) formatAndClient() (*client.Client, error) {
	if err := a.checkFormat(); err != nil {
		return nil, err
	}
	return a.client()
}

func anys[T any](list []T) []any {
	out := make([]any, len(list))
	for i, one := range list {
		out[i] = one
	}
	return out
}

func refuses(proxies []client.ProxyStatus) bool {
	for _, p := range proxies {
		if p.Refused != "" {
			return true
		}
	}
	return false
}

func proxyTable(proxies []client.ProxyStatus) table {
	t := table{columns: []string{"NODE", "PROXY", "STATE", "PLAN", "CLOSED", "REFUSED BECAUSE"}}
	for _, p := range proxies {
		state := "ok"
		switch {
		case p.Refused != "":
			state = "refused"
		case !p.Connected:
			state = "out of touch"
		}
		t.names = append(t.names, "proxy/"+p.Node+"/"+p.Proxy)
		t.rows = append(t.rows, []string{
			p.Node, p.Proxy, state, strconv.FormatUint(p.Position.Revision, 10), strconv.FormatUint(p.Closed, 10), dash(p.Refused),
		})
	}
	return t
}

func (a *app) memberTable(members []client.Member) table {
	t := table{columns: []string{"NAME", "STATE", "ROLE", "VERSION", "UP", "AGENTS", "REVISION", "ADDRESS", "ID", "LEVEL"}, wide: 7}
	for _, m := range members {
		t.names = append(t.names, "member/"+m.Name)
		t.rows = append(t.rows, []string{
			m.Name, memberState(m), role(m), dash(m.Version), a.age(m.Started), strconv.Itoa(m.Agents), strconv.FormatUint(m.Position.Revision, 10),
			dash(m.Address), m.ID, strconv.Itoa(m.FeatureLevel),
		})
	}
	return t
}

// memberState says what is wrong with a server, in few words.
func memberState(m client.Member) string {
	switch {
	case m.Problem != "":
		return "no answer"
	case m.State == client.StateDifferent:
		return "other state"
	case m.Contact > 0:
		return "no leader for " + m.Contact.String()
	default:
		return "ok"
	}
}

func (a *app) members(cmd *cobra.Command, watch bool) error {
	api, err := a.formatAndClient()
	if err != nil {
		return err
	}
	told := 0 // so many held nodes
	read := func() (client.Members, table, error) {
		st, err := api.Members(cmd.Context())
		if err == nil && len(st.Held) != told {
			told = len(st.Held)
			_, err = fmt.Fprintln(a.err, heldText(st.Held))
		}
		return st, a.memberTable(st.Members), err
	}
	if watch {
		return a.poll(cmd.Context(), func() (table, []any, error) {
			st, t, err := read()
			for i := range st.Members {
				st.Members[i].Applied = 0 // the log moves when nothing else does
			}
			return t, anys(st.Members), err
		})
	}
	st, t, err := read()
	if err != nil {
		return err
	}
	return a.show(t, st.Members)
}

// maxHeldNames is how many of the held nodes are named.
const maxHeldNames = 5

// heldText says which nodes are held, and what to do about it.
func heldText(held []string) string {
	if len(held) == 0 {
		return "no node is held any more"
	}
	names := strings.Join(held[:min(len(held), maxHeldNames)], ", ")
	if len(held) > maxHeldNames {
		names += fmt.Sprintf(" and %d more", len(held)-maxHeldNames)
	}
	return fmt.Sprintf("%d nodes fell silent at once, which is more than half of all: %s. Their instances are used as before, until they are back or\n"+
		"you know that they are gone: meshctl node release", len(held), names)
}
