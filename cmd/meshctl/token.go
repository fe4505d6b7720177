package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

const clock = "2006-01-02 15:04:05 MST"

func (a *app) tokenCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "token", Short: "tokens: of people and programs, and of hosts that join", RunE: group, Args: cobra.ArbitraryArgs,
		Long: `A token says who calls the servers, and its policies what it may do. It is named
by its accessor, which is no secret; the secret is shown once, alone on standard
output, and kept nowhere. On a server, root and the server's user need no token.`,
	}
	c.AddCommand(a.tokenListCommand(), a.tokenGetCommand(), a.tokenCreateCommand(), a.tokenRotateCommand(), a.tokenDeleteCommand(), a.joinCommand())
	return c
}

func (a *app) tokenListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list tokens, without their secrets", Args: exactly(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			all, err := api.Tokens(cmd.Context())
			if err != nil {
				return err
			}
			return a.showTokens(all.Tokens, all.Tokens)
		},
	}
}

func (a *app) tokenGetCommand() *cobra.Command {
	return &cobra.Command{
		Use: "get ACCESSOR", Short: "show one token, without its secret", Args: exactly(1, "the accessor of a token"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			t, err := api.Token(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showTokens([]client.Token{t}, t)
		},
	}
}

// showTokens shows a table, or the value behind it.
func (a *app) showTokens(tokens []client.Token, value any) error {
	t := table{columns: []string{"ACCESSOR", "DESCRIPTION", "POLICIES", "ROLES", "EXPIRES", "CREATED", "BY", "ROTATED", "OLD SECRET UNTIL"}, wide: 6}
	for _, one := range tokens {
		t.names = append(t.names, "token/"+one.Accessor)
		t.rows = append(t.rows, []string{
			one.Accessor, dash(one.Description), dash(strings.Join(one.Policies, ",")), dash(strings.Join(one.Roles, ",")), a.expires(one),
			a.ago(one.Created), dash(one.CreatedBy), a.pointed(one.Rotated), a.pointed(one.OldSecretUntil),
		})
	}
	return a.show(t, value)
}

// expires is when a token ends, for people; in CSV it is a time.
func (a *app) expires(t client.Token) string {
	switch {
	case t.Expires == nil:
		return "-"
	case a.format == "csv":
		return t.Expires.UTC().Format(time.RFC3339)
	case t.Expired:
		return "expired"
	default:
		return "in " + time.Until(*t.Expires).Round(time.Second).String()
	}
}

func (a *app) pointed(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var req client.TokenRequest
	var ttl time.Duration
	c := &cobra.Command{
		Use: "create --policy POLICY", Short: "make a token and print its secret alone", Args: exactly(0, "no arguments; use --policy or --role"),
		Long: `create makes a token with policies, roles or both, and prints its secret alone on
standard output, this once. It may do no more, and lasts no longer, than the one
that makes it.`,
		Example: "  meshctl token create --policy shop-deployer --ttl 24h --description deploy-ci > ci.token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(req.Policies)+len(req.Roles) == 0 {
				return usage("what may it do? use --policy NAME or --role NAME; meshctl policy list has the policies")
			}
			if ttl < 0 || ttl == 0 && cmd.Flags().Changed("ttl") {
				return usage("--ttl %s: write a duration such as 24h; without the flag there is no end", ttl)
			}
			req.TTL = catalog.Duration(ttl)
			return a.newToken(func(api *client.Client) (client.NewToken, error) { return api.CreateToken(cmd.Context(), req) })
		},
	}
	f := c.Flags()
	f.StringSliceVar(&req.Policies, "policy", nil, "policy that it gets; may be repeated")
	f.StringSliceVar(&req.Roles, "role", nil, "role that it gets; may be repeated")
	f.DurationVar(&ttl, "ttl", 0, "how long it is good (default: as long as the token that makes it)")
	f.StringVar(&req.Description, "description", "", "what people call it, as in deploy-ci")
	return c
}

func (a *app) tokenRotateCommand() *cobra.Command {
	var grace time.Duration
	c := &cobra.Command{
		Use: "rotate ACCESSOR", Short: "give a token another secret and print that alone", Args: exactly(1, "the accessor of a token"),
		Long: `rotate gives a token another secret, and prints it alone on standard output, this
once. The old secret ends at once, or after --grace.`,
		Example: "  meshctl token rotate 1f0c6a41d5b92e83 --grace 1h > ci.token",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.newToken(func(api *client.Client) (client.NewToken, error) {
				return api.RotateToken(cmd.Context(), args[0], client.RotateRequest{Grace: catalog.Duration(grace)})
			})
		},
	}
	c.Flags().DurationVar(&grace, "grace", 0, "how long the old secret goes on, at most 168h")
	return c
}

// newToken prints what a call made: the secret alone on standard output.
func (a *app) newToken(call func(*client.Client) (client.NewToken, error)) error {
	if err := a.checkFormat(); err != nil {
		return err
	}
	api, err := a.client()
	if err != nil {
		return err
	}
	made, err := call(api)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(a.err, tokenText(made.Token)); err != nil {
		return err
	}
	if a.format == "json" || a.format == "yaml" {
		return a.show(table{}, made)
	}
	_, err = fmt.Fprintln(a.out, made.Secret)
	return err
}

// tokenText says in a line what a token is.
func tokenText(t client.Token) string {
	text := "token " + t.Accessor
	if t.Description != "" {
		text += " (" + t.Description + ")"
	}
	var has []string
	if len(t.Policies) > 0 {
		has = append(has, "policies "+strings.Join(t.Policies, ", "))
	}
	if len(t.Roles) > 0 {
		has = append(has, "roles "+strings.Join(t.Roles, ", "))
	}
	if t.Expires != nil {
		has = append(has, "until "+t.Expires.Local().Format(clock))
	}
	if t.OldSecretUntil != nil {
		has = append(has, "its old secret until "+t.OldSecretUntil.Local().Format(clock))
	}
	if len(has) == 0 {
		return text
	}
	return text + ": " + strings.Join(has, ", ")
}

func (a *app) tokenDeleteCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "delete ACCESSOR", Short: "end a token at once", Args: exactly(1, "the accessor of a token"),
		Long: `delete ends a token at once, and the watches that were made with it. The last one
that may do everything takes --force: then only root and the server's user are
admins, on the servers themselves.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			gone, err := api.DeleteToken(cmd.Context(), args[0], force)
			if err != nil {
				return err
			}
			if a.format != "table" && a.format != "wide" {
				return a.showTokens([]client.Token{gone}, gone)
			}
			_, err = fmt.Fprintf(a.out, "token %s: deleted\n", gone.Accessor)
			return err
		},
	}
	c.Flags().BoolVar(&force, "force", false, "even if it is the last one that may do everything")
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
			if _, err := fmt.Fprintf(a.err, "admits node %s once, until %s\n", req.Node, token.Expires.Local().Format(clock)); err != nil {
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
