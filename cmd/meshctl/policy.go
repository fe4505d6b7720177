package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

func (a *app) policyCommand() *cobra.Command {
	return a.kindCommand(client.KindPolicy, "what tokens may do", `Policies are resources: write them in manifests, and apply them.

    policy "deployer" {
      rules = [
        { kinds = ["service", "intention"], namespace = "shop", name = "api-*", verbs = ["read", "write"] },
      ]
    }

The policies admin and read-only are built in.`)
}

func (a *app) roleCommand() *cobra.Command {
	return a.kindCommand(client.KindRole, "lists of policies", `Roles are resources: write them in manifests, and apply them.

    role "shop-team" {
      policies = ["deployer", "read-only"]
    }`)
}

// kindCommand is for kinds that have commands of their own: list, get and delete
// are get and delete of the kind.
func (a *app) kindCommand(kind client.Kind, short, long string) *cobra.Command {
	c := &cobra.Command{Use: string(kind), Short: short, Long: long, RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(
		&cobra.Command{
			Use: "list", Short: "list " + kind.Collection(), Args: exactly(0, "no arguments"),
			RunE: func(cmd *cobra.Command, _ []string) error { return a.get(cmd, kind, nil, lister{}) },
		},
		&cobra.Command{
			Use: "get NAME", Short: "show one " + string(kind) + " (-o yaml: as apply reads it)", Args: exactly(1, "the name of a "+string(kind)),
			RunE: func(cmd *cobra.Command, args []string) error { return a.get(cmd, kind, args, lister{}) },
		},
		&cobra.Command{
			Use: "delete NAME", Short: "delete one that nothing has any more", Args: exactly(1, "the name of a "+string(kind)),
			RunE: func(cmd *cobra.Command, args []string) error { return a.remove(cmd, kind, args, &waiter{}) },
		},
	)
	return c
}

func policyRow(_ *app, i client.Item) ([]string, error) {
	var spec catalog.Policy
	if err := decode(i, &spec, nil); err != nil {
		return nil, err
	}
	var rules []string
	for _, r := range spec.Rules {
		rules = append(rules, ruleText(r))
	}
	return []string{i.Name, dash(strings.Join(rules, "; ")), dash(spec.Description)}, nil
}

// ruleText is a rule in a line: "read,write service,intention shop/api-*".
func ruleText(r catalog.PolicyRule) string {
	text := strings.Join(r.Verbs, ",") + " " + strings.Join(r.Kinds, ",")
	switch {
	case r.Namespace != "":
		return text + " " + r.Namespace + "/" + r.Name
	case r.Name != "":
		return text + " " + r.Name
	default:
		return text
	}
}

func roleRow(_ *app, i client.Item) ([]string, error) {
	var spec catalog.Role
	if err := decode(i, &spec, nil); err != nil {
		return nil, err
	}
	return []string{i.Name, strings.Join(spec.Policies, ","), dash(spec.Description)}, nil
}
