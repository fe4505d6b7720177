package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server/client"
)

func (a *app) proxyCommand() *cobra.Command {
	c := &cobra.Command{Use: "proxy", Short: "the proxies of the mesh", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(&cobra.Command{
		Use: "status", Short: "show what each proxy runs; exit 3 if one refuses its plan", Args: exactly(0, "no arguments"),
		Long: `status shows what each proxy last reported to the server that answers: the
revision of the newest input of the plan that it runs, which changes only when
something that concerns it does, and whether it refused a newer one.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.serverStatus(cmd)
			if err != nil {
				return err
			}
			return a.showProxies(st.Proxies)
		},
	})
	return c
}

func (a *app) membersCommand() *cobra.Command {
	return &cobra.Command{
		Use: "members", Aliases: []string{"member"}, Short: "show the servers of the mesh", Args: exactly(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.members(cmd) },
	}
}

func (a *app) serverStatus(cmd *cobra.Command) (client.Status, error) {
	if err := a.checkFormat(); err != nil {
		return client.Status{}, err
	}
	api, err := a.client()
	if err != nil {
		return client.Status{}, err
	}
	return api.Status(cmd.Context())
}

func (a *app) showProxies(proxies []client.ProxyStatus) error {
	t := table{columns: []string{"NODE", "PROXY", "STATE", "PLAN", "CLOSED", "REFUSED BECAUSE"}}
	refused := false
	for _, p := range proxies {
		state := "ok"
		switch {
		case p.Refused != "":
			state, refused = "refused", true
		case !p.Connected:
			state = "out of touch"
		}
		t.names = append(t.names, "proxy/"+p.Node+"/"+p.Proxy)
		t.rows = append(t.rows, []string{
			p.Node, p.Proxy, state, strconv.FormatUint(p.Position.Revision, 10), strconv.FormatUint(p.Closed, 10), dash(p.Refused),
		})
	}
	if err := a.show(t, proxies); err != nil || !refused {
		return err
	}
	return fail(exitDenied, "")
}

func (a *app) members(cmd *cobra.Command) error {
	st, err := a.serverStatus(cmd)
	if err != nil {
		return err
	}
	t := table{columns: []string{"NAME", "VERSION", "UP", "AGENTS", "REVISION"}}
	for _, m := range st.Members {
		t.names = append(t.names, "member/"+m.Name)
		t.rows = append(t.rows, []string{m.Name, dash(m.Version), since(m.Started), strconv.Itoa(m.Agents), strconv.FormatUint(m.Position.Revision, 10)})
	}
	return a.show(t, st.Members)
}
