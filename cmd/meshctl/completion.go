package main

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

// completionWait bounds what a shell waits for names.
const completionWait = time.Second

// completer is what cobra calls for the rest of a word.
type completer = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// complete returns a completer of the names of kinds. Where no server answers in
// time there are none, and nothing is said: a shell is no place for it.
func (a *app) complete(kinds ...client.Kind) completer {
	return func(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.namesOf(c, kinds...), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFirst completes the first n arguments.
func (a *app) completeFirst(n int, kinds ...client.Kind) completer {
	return func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.namesOf(c, kinds...), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeKind completes KIND, and then the names of that kind.
func (a *app) completeKind(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return append(collections(), "members"), cobra.ShellCompDirectiveNoFileComp
	}
	kind, err := kindOf(args[0])
	switch {
	case err != nil, len(args) > 1 && kind != client.KindIntention, len(args) > 2:
		return nil, cobra.ShellCompDirectiveNoFileComp
	case kind == client.KindIntention, kind == client.KindInstance:
		kind = client.KindService // is what they are named by
	}
	return a.namesOf(c, kind), cobra.ShellCompDirectiveNoFileComp
}

// namesOf asks the servers.
func (a *app) namesOf(c *cobra.Command, kinds ...client.Kind) []string {
	parent := c.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionWait)
	defer cancel()
	api, err := a.client()
	if err != nil {
		return nil
	}
	var names []string
	for _, kind := range kinds {
		sel := client.Selection{}
		if kind == client.KindService || kind == client.KindInstance {
			sel.Namespace = a.inNamespace()
		}
		list, err := api.List(ctx, kind, sel)
		if err != nil {
			return nil
		}
		for _, i := range list.Items {
			name := i.Name
			switch {
			case kind == client.KindInstance: // SERVICE/ID
				name = strings.TrimSuffix(i.Name, i.Ref.Parts[2]+"/"+i.Ref.Parts[3]) + i.Ref.Parts[3]
			case kind == client.KindService && sel.Namespace != "":
				name = i.Ref.Parts[1]
			}
			names = append(names, name)
		}
	}
	return names
}

// completeToken completes the accessor of a token, with what people call it.
func (a *app) completeToken(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	parent := c.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionWait)
	defer cancel()
	api, err := a.client()
	if err != nil || len(args) > 0 && c.Name() != "can-i" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	all, err := api.Tokens(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, t := range all.Tokens {
		names = append(names, cobra.CompletionWithDesc(t.Accessor, t.Description))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeContext completes the name of a context.
func (a *app) completeContext(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeContextFlag(c, args, word)
}

func (a *app) completeContextFlag(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	all, _ := a.readContexts() // no contexts, then
	return slices.Sorted(maps.Keys(all.Contexts)), cobra.ShellCompDirectiveNoFileComp
}

// completeCan completes VERB, KIND, and names as far as there are resources of the
// kind.
func (a *app) completeCan(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return []string{catalog.VerbRead, catalog.VerbWrite, catalog.VerbTap}, cobra.ShellCompDirectiveNoFileComp
	case 1:
		return catalog.PolicyKinds(), cobra.ShellCompDirectiveNoFileComp
	}
	kind := client.Kind(args[1])
	switch {
	case len(args) > 2 || !slices.Contains(client.Kinds(), kind):
		return nil, cobra.ShellCompDirectiveNoFileComp
	case kind == client.KindIntention, kind == client.KindInstance:
		kind = client.KindService // is what rules name them by
	}
	return a.namesOf(c, kind), cobra.ShellCompDirectiveNoFileComp
}

// completions tells the commands what their arguments are.
func (a *app) completions(root *cobra.Command) {
	services := a.completeFirst(2, client.KindService)
	drained := a.completeFirst(1, client.KindNode, client.KindInstance)
	for path, complete := range map[string]completer{
		"get": a.completeKind, "delete": a.completeKind,
		"services": a.completeFirst(1, client.KindService), "nodes": a.completeFirst(1, client.KindNode),
		"instances": a.completeFirst(1, client.KindService), "nodes leave": a.completeFirst(1, client.KindNode),
		"explain": services, "drain": drained, "undrain": drained,
		"intention allow": services, "intention deny": services, "intention get": services, "intention delete": services,
		"intention check": services, "intention history": services,
		"policy get": a.completeFirst(1, client.KindPolicy), "policy delete": a.completeFirst(1, client.KindPolicy),
		"role get": a.completeFirst(1, client.KindRole), "role delete": a.completeFirst(1, client.KindRole),
		"token get": a.completeToken, "token rotate": a.completeToken, "token delete": a.completeToken,
		"context use": a.completeContext, "context delete": a.completeContext, "can-i": a.completeCan,
	} {
		if c, _, err := root.Find(strings.Fields(path)); err == nil && c != root {
			c.ValidArgsFunction = complete
			c.ValidArgs = nil
		}
	}
	for _, c := range []struct {
		path, flag string
		complete   completer
	}{
		{"drain", "node", a.complete(client.KindNode)},
		{"undrain", "node", a.complete(client.KindNode)},
		{"token create", "policy", a.complete(client.KindPolicy)},
		{"token create", "role", a.complete(client.KindRole)},
		{"can-i", "token-accessor", a.completeToken},
	} {
		if cmd, _, err := root.Find(strings.Fields(c.path)); err == nil {
			_ = cmd.RegisterFlagCompletionFunc(c.flag, c.complete) // it has the flag
		}
	}
	_ = root.RegisterFlagCompletionFunc("context", a.completeContextFlag)              // it has the flag
	_ = root.RegisterFlagCompletionFunc("namespace", a.complete(client.KindNamespace)) // it has the flag
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}
