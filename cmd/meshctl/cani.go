package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) canCommand() *cobra.Command {
	var accessor string
	c := &cobra.Command{
		Use: "can-i VERB KIND [NAME]", Short: "tell whether a token may do something: exit 0 yes, 3 no", Args: cobra.RangeArgs(2, 3),
		Long: `can-i asks the servers whether the token in use, or another one, may read, write
or tap something, and which rule allows it, or which would. Without a name, all of
the kind are meant. It ends with 0 for yes and 3 for no.`,
		Example: "  meshctl can-i write intention default/api\n  meshctl can-i read nodes\n  meshctl can-i write service shop/cart --token-accessor 1f0c6a41d5b92e83",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			req := client.CanRequest{Verb: args[0], Kind: policyKind(args[1]), Accessor: accessor}
			if len(args) == 3 {
				req.Namespace, req.Name = a.object(req.Kind, args[2])
			} else if namespaced, _ := catalog.ScopeOfKind(req.Kind); namespaced {
				req.Namespace = a.inNamespace()
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			can, err := api.Can(cmd.Context(), req)
			if err != nil {
				return err
			}
			word := map[bool]string{true: "yes", false: "no"}[can.Allowed]
			if a.format == "table" || a.format == "wide" {
				_, err = fmt.Fprintf(a.out, "%s: %s\n", word, can.Text)
			} else {
				err = a.show(table{columns: []string{"ALLOWED", "POLICY", "TEXT"}, rows: [][]string{{word, dash(can.Policy), can.Text}}, names: []string{word}}, can)
			}
			if err == nil && !can.Allowed {
				err = fail(exitDenied, "")
			}
			return err
		},
	}
	c.Flags().StringVar(&accessor, "token-accessor", "", "ask about this token; takes the right to read it")
	return c
}

// policyKind reads a kind of policies, in singular or plural, with "-" for "_".
func policyKind(s string) string {
	s = strings.ReplaceAll(s, "-", "_")
	for _, k := range catalog.PolicyKinds() {
		if s == k || s == client.Kind(k).Collection() {
			return k
		}
	}
	return s // the servers say what is wrong with it
}

// object reads what can-i is about.
func (a *app) object(kind, name string) (namespace, rest string) {
	if namespaced, _ := catalog.ScopeOfKind(kind); !namespaced {
		return "", name
	}
	ns, rest, has := strings.Cut(a.qualify(name), "/")
	if !has {
		return catalog.DefaultNamespace, ns
	}
	return ns, rest
}

func (a *app) whoamiCommand() *cobra.Command {
	return &cobra.Command{
		Use: "whoami", Short: "show the token in use, and what it may do", Args: exactly(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			who, err := api.Whoami(cmd.Context())
			if err != nil {
				return err
			}
			text := "local: the admin socket of a server"
			if who.Token != nil {
				text = tokenText(*who.Token)
			}
			t := table{columns: []string{"KINDS", "NAMESPACE", "NAME", "VERBS"}}
			for _, r := range who.Rules {
				t.names = append(t.names, ruleText(r))
				t.rows = append(t.rows, []string{strings.Join(r.Kinds, ","), dash(r.Namespace), dash(r.Name), strings.Join(r.Verbs, ",")})
			}
			if a.format == "table" || a.format == "wide" {
				if _, err := fmt.Fprintln(a.err, text); err != nil {
					return err
				}
			}
			return a.show(t, who)
		},
	}
}
