package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server/client"
)

// question is a request that might be made: SRC DST [METHOD PATH] and flags.
type question struct {
	headers []string
	port    string
}

func (q *question) flags(c *cobra.Command) {
	c.Flags().StringArrayVarP(&q.headers, "header", "H", nil, `a request header "name=value"; may be repeated`)
	c.Flags().StringVar(&q.port, "port", "", "port of the destination by name; its default port if not given")
}

func (q *question) args(c *cobra.Command, args []string) error {
	if len(args) != 2 && len(args) != 4 {
		return usage("%s takes SRC DST, or SRC DST METHOD PATH; got %d arguments", command(c), len(args))
	}
	return nil
}

func (q *question) request(a *app, args []string) (client.AccessRequest, error) {
	if err := a.checkFormat(); err != nil {
		return client.AccessRequest{}, err
	}
	req := client.AccessRequest{Source: a.qualifySource(args[0]), Destination: a.qualify(args[1]), Port: q.port}
	if len(args) == 4 {
		req.Method, req.Path = args[2], args[3]
	}
	for _, h := range q.headers {
		name, value, ok := strings.Cut(h, "=")
		if !ok {
			return req, usage("--header %q: write name=value", h)
		}
		if req.Headers == nil {
			req.Headers = map[string][]string{}
		}
		req.Headers[name] = append(req.Headers[name], value)
	}
	return req, nil
}

func (a *app) explainCommand() *cobra.Command {
	var f watchFlags
	c := a.questionCommand("explain", "say what would become of a request, and why; exit 3 if it would not arrive",
		func(ctx context.Context, api *client.Client, req client.AccessRequest) error {
			e, err := api.Explain(ctx, req)
			if err != nil {
				return err
			}
			return a.showExplanation(e)
		})
	c.Use = "explain SRC DST [METHOD PATH] | id:ID"
	c.Long = `explain says what would become of a request, and why, with the next command to type.

id:ID explains what has happened: ID is the mesh-error-id of a response, or the ID
of a line of "meshctl denials" or "meshctl tap". The proxies keep their newest 1,024
denials, and as many errors. Without a server, root and the group mesh ask the agent
of the host; so does --local.`
	c.Example = "  meshctl explain web api POST /v1/jobs\n  meshctl explain id:7f3a91"
	f.defineLocal(c)
	args, run := c.Args, c.RunE
	c.Args = func(cmd *cobra.Command, given []string) error {
		if _, ok := errorID(given); ok {
			return nil
		}
		if f.local {
			return usage("--local is for id:ID")
		}
		return args(cmd, given)
	}
	c.RunE = func(cmd *cobra.Command, given []string) error {
		id, ok := errorID(given)
		if !ok {
			return run(cmd, given)
		}
		o, err := a.observe(f)
		if err != nil {
			return err
		}
		return a.explainID(cmd.Context(), o, id)
	}
	return c
}

// errorID returns the ID of the one argument id:ID.
func errorID(args []string) (id string, ok bool) {
	if len(args) != 1 {
		return "", false
	}
	return strings.CutPrefix(args[0], "id:")
}

// questionCommand is a command about a request that might be made.
func (a *app) questionCommand(name, short string, ask func(context.Context, *client.Client, client.AccessRequest) error) *cobra.Command {
	var q question
	c := &cobra.Command{
		Use: name + " SRC DST [METHOD PATH]", Short: short, Args: q.args,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := q.request(a, args)
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			return ask(cmd.Context(), api, req)
		},
	}
	q.flags(c)
	return c
}

var factMarks = map[string]string{client.FactOK: "✓", client.FactWarn: "!", client.FactFail: "✗"}

func (a *app) showExplanation(e client.Explanation) error {
	var err error
	if a.format == "table" || a.format == "wide" {
		var b strings.Builder
		fmt.Fprintln(&b, e.Verdict)
		for _, f := range e.Facts {
			fmt.Fprintf(&b, " %s %s\n", factMarks[f.Mark], f.Text)
		}
		for _, n := range e.Next {
			fmt.Fprintf(&b, "   next: %s\n", n)
		}
		_, err = fmt.Fprint(a.out, b.String())
	} else {
		t := table{columns: []string{"MARK", "FACT"}, names: []string{e.Verdict}}
		for _, f := range e.Facts {
			t.rows = append(t.rows, []string{f.Mark, f.Text})
		}
		err = a.show(t, e)
	}
	if err != nil || e.Access.Allowed && e.Works {
		return err
	}
	return fail(exitDenied, "")
}
