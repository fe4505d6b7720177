package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) tokenCommand() *cobra.Command {
	c := &cobra.Command{Use: "token", Short: "tokens", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.joinCommand())
	return c
}

func (a *app) joinCommand() *cobra.Command {
	var req client.JoinTokenRequest
	var ttl time.Duration
	c := &cobra.Command{
		Use: "join --node NAME", Short: "make a one-time token that admits one node", Args: exactly(0, "no arguments; use --node"),
		Long: `join makes a one-time token that admits one node, and prints it alone.

--services says what the node may register, receive traffic for and get
certificates of: nothing by default.`,
		Example: "  meshctl token join --node vm-a --services web,batch/cron --ttl 10m > join.token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.Node == "" {
				return usage("which node? use --node NAME")
			}
			req.TTL = catalog.Duration(ttl)
			for i, s := range req.Services {
				req.Services[i] = a.qualify(s)
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			token, err := api.JoinToken(cmd.Context(), req)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(a.err, "admits node %s once, until %s\n", req.Node, token.Expires.Local().Format("2006-01-02 15:04:05 MST")); err != nil {
				return err
			}
			for _, w := range token.Warnings {
				if _, err := fmt.Fprintln(a.err, "warning: "+w); err != nil {
					return err
				}
			}
			if a.format == "json" || a.format == "yaml" {
				return a.show(table{}, token)
			}
			_, err = fmt.Fprintln(a.out, token.Token)
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&req.Node, "node", "", "name of the node")
	f.StringSliceVar(&req.Services, "services", nil, `services that the node may run: "web", "ns/web", "ns/*" or "*"`)
	f.DurationVar(&ttl, "ttl", 0, "how long the token may be used (default 10m)")
	f.BoolVar(&req.Replace, "replace", false, "admit a rebuilt host under a name that is in use")
	return c
}
