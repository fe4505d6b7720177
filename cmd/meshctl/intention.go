package main

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
)

func (a *app) intentionCommand() *cobra.Command {
	c := &cobra.Command{Use: "intention", Short: "who may call whom", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(
		a.writeIntention(intentions.Allow, "let a source call a destination"),
		a.writeIntention(intentions.Deny, "forbid a source to call a destination, and close its connections"),
		&cobra.Command{
			Use: "get SRC DST", Short: "show one intention", Args: exactly(2, "a source and a destination"),
			RunE: func(cmd *cobra.Command, args []string) error { return a.get(cmd, client.KindIntention, args, lister{}) },
		},
		a.listIntentions(), a.deleteIntention(), a.checkIntention(), a.historyCommand(), a.undoCommand(),
	)
	return c
}

// change is what the flags of allow and deny say.
type change struct {
	http         []string
	ports        []string
	life         time.Duration
	reason       string
	add, replace bool
	wait         waiter
}

func (a *app) writeIntention(action intentions.Action, short string) *cobra.Command {
	var ch change
	c := &cobra.Command{
		Use: string(action) + " SRC DST", Short: short, Args: exactly(2, "a source and a destination"),
		Long: short + `.

SRC and DST are SERVICE, NAMESPACE/SERVICE, NAMESPACE/* or *; a source of
another trust domain is a SPIFFE ID. The most specific intention decides alone,
and what it does not allow is denied.

--http "METHODS PATH" makes it a rule for some requests: methods by comma or *,
then a path: /exact, /prefix/*, or ~regular-expression.`,
		Example: fmt.Sprintf("  meshctl intention %s web api\n  meshctl intention %s web api --http \"GET,HEAD /v1/*\" --for 2h --reason OPS-77", action, action),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.setIntention(cmd, action, args[0], args[1], ch)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&ch.http, "http", nil, `a rule "METHODS PATH" for HTTP requests; may be repeated`)
	f.StringSliceVar(&ch.ports, "port", nil, "ports of the destination by name; all if not given")
	f.DurationVar(&ch.life, "for", 0, "let the intention expire after this time")
	f.StringVar(&ch.reason, "reason", "", "why, for those who come after you")
	f.BoolVar(&ch.add, "add", false, "add the rules to those that are there: a deny before them, an allow after them")
	f.BoolVar(&ch.replace, "replace", false, "replace what is there")
	exclusive(c, "add", "replace")
	ch.wait.flags(c)
	return c
}

func (a *app) setIntention(cmd *cobra.Command, action intentions.Action, source, destination string, ch change) error {
	key, err := a.intentionKey(source, destination)
	if err != nil {
		return err
	}
	next, err := ch.intention(action, a.qualifySource(source), a.qualify(destination))
	if err != nil {
		return err
	}
	api, err := a.client()
	if err != nil {
		return err
	}
	ref, revision := client.IntentionRef(key), uint64(0)
	item, err := api.Get(cmd.Context(), ref)
	switch {
	case err == nil:
		revision = item.Revision
		var old intentions.Intention
		if err := json.Unmarshal(item.Spec, &old); err != nil {
			return fmt.Errorf("intention %s: this version cannot read it: %w", key, err)
		}
		done, err := ch.merge(&next, old)
		if err != nil {
			return err
		}
		if done {
			_, err := fmt.Fprintf(a.out, "intention %s: unchanged\n", key)
			return err
		}
	case client.CodeOf(err) == client.CodePermission: // who may write may read: the write says what is missing
	case client.CodeOf(err) != client.CodeNotFound:
		return err
	}
	spec, err := json.Marshal(next)
	if err != nil {
		return err
	}
	before := ch.wait.before(cmd.Context(), api, keyServices(key))
	result, err := api.Put(cmd.Context(), ref, spec, revision)
	if err != nil {
		return err
	}
	if err := a.showResult(result); err != nil {
		return err
	}
	return ch.wait.wait(cmd.Context(), a, api, result.Position, before)
}

// intention is what the flags ask for, on an empty slate.
func (ch change) intention(action intentions.Action, source, destination string) (intentions.Intention, error) {
	i := intentions.Intention{Source: source, Destination: destination, Ports: ch.ports, Reason: ch.reason}
	if ch.life < 0 {
		return i, usage("--for %s: the time must be positive", ch.life)
	}
	if ch.life > 0 {
		at := time.Now().Add(ch.life).UTC().Truncate(time.Second)
		i.Expires = &at
	}
	if len(ch.http) == 0 {
		i.Action = action
		return i, nil
	}
	for _, text := range ch.http {
		rule, err := intentions.ParseHTTPRule(action, text)
		if err != nil {
			return i, usage("--http: %v", err)
		}
		i.Rules = append(i.Rules, rule)
	}
	return i, nil
}

// merge brings what is asked for together with what is there. It reports
// whether nothing is left to do, and refuses to change what the user may not
// know of.
func (ch change) merge(next *intentions.Intention, old intentions.Intention) (done bool, err error) {
	asked := *next // what --replace would write
	if next.Reason == "" && !ch.replace {
		next.Reason = old.Reason
	}
	if ch.add {
		if len(next.Rules) == 0 {
			return false, usage("--add adds rules: give --http")
		}
		if len(old.Rules) == 0 {
			return false, fail(exitConflict, "intention %s → %s has no rules, it decides %s for every request: use --replace to put rules in its place", old.Source, old.Destination, old.Action)
		}
		fresh := slices.DeleteFunc(next.Rules, func(r intentions.Rule) bool {
			return slices.ContainsFunc(old.Rules, func(o intentions.Rule) bool { return reflect.DeepEqual(o, r) })
		})
		if len(fresh) > 0 && fresh[0].Action == intentions.Deny {
			next.Rules = append(fresh, old.Rules...)
		} else {
			next.Rules = append(slices.Clone(old.Rules), fresh...)
		}
		if ch.ports == nil {
			next.Ports = old.Ports
		}
		if next.Expires == nil {
			next.Expires = old.Expires
		}
		return equalIntentions(*next, old), nil
	}
	if next.Expires == nil && !ch.replace {
		next.Expires = old.Expires
	}
	if equalIntentions(*next, old) {
		return true, nil
	}
	if ch.replace {
		return false, nil
	}
	hint := "--replace to replace it"
	if len(next.Rules) > 0 && len(old.Rules) > 0 {
		hint = "--add to add the rules, or --replace to replace it"
	}
	return false, fail(exitConflict, "intention %s → %s exists and says something else; nothing was changed\n  - %s\n  + %s\n  → repeat with %s",
		old.Source, old.Destination, whole(old), whole(asked), hint)
}

// whole is all that an intention says, in one line.
func whole(i intentions.Intention) string {
	text := i.Summary()
	if i.Expires != nil {
		text += ", until " + i.Expires.Local().Format("2006-01-02 15:04:05 MST")
	}
	if i.Reason != "" {
		text += fmt.Sprintf(", reason %q", i.Reason)
	}
	return text
}

// equalIntentions compares all but the spelling of the two sides.
func equalIntentions(a, b intentions.Intention) bool {
	sameEnd := (a.Expires == nil) == (b.Expires == nil) && (a.Expires == nil || a.Expires.Equal(*b.Expires))
	return a.Action == b.Action && sameEnd && a.Reason == b.Reason && slices.Equal(a.Ports, b.Ports) &&
		slices.EqualFunc(a.Rules, b.Rules, func(x, y intentions.Rule) bool { return reflect.DeepEqual(x, y) })
}

func (a *app) listIntentions() *cobra.Command {
	var source, destination string
	c := &cobra.Command{
		Use: "list", Short: "list intentions", Args: exactly(0, "no arguments; use --src and --dst"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			list, err := api.List(cmd.Context(), client.KindIntention, client.Selection{Namespace: a.inNamespace()})
			if err != nil {
				return err
			}
			items := slices.DeleteFunc(list.Items, func(i client.Item) bool {
				return !matches(destination, a, i.Ref.Parts[0], i.Ref.Parts[1]) || !matches(source, a, i.Ref.Parts[2], i.Ref.Parts[3])
			})
			return a.showItems(client.KindIntention, items)
		},
	}
	c.Flags().StringVar(&source, "src", "", "only intentions with this source")
	c.Flags().StringVar(&destination, "dst", "", "only intentions with this destination")
	return c
}

func matches(want string, a *app, namespace, name string) bool {
	if want == "" {
		return true
	}
	ns, n, ok := strings.Cut(a.qualify(want), "/")
	if !ok {
		ns, n = "default", want
	}
	return ns == namespace && n == name
}

func (a *app) deleteIntention() *cobra.Command {
	var w waiter
	c := &cobra.Command{
		Use: "delete SRC DST", Short: "delete an intention; the next less specific one decides, or none: denied", Args: exactly(2, "a source and a destination"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.remove(cmd, client.KindIntention, args, &w) },
	}
	w.flags(c)
	return c
}

func (a *app) checkIntention() *cobra.Command {
	return a.questionCommand("check", "decide a request as a proxy would; exit 3 if denied",
		func(ctx context.Context, api *client.Client, req client.AccessRequest) error {
			access, err := api.Check(ctx, req)
			if err != nil {
				return err
			}
			return a.showAccess(access)
		})
}

func (a *app) showAccess(access client.Access) error {
	verdict := "denied"
	switch {
	case access.Allowed:
		verdict = "allowed"
	case access.Reason == client.ReasonDepends:
		verdict = "depends"
	}
	t := table{columns: []string{"VERDICT", "WHY"}, rows: [][]string{{verdict, access.Text}}, names: []string{verdict}}
	var err error
	if a.format == "table" || a.format == "wide" {
		_, err = fmt.Fprintf(a.out, "%s: %s\n", verdict, access.Text)
	} else {
		err = a.show(t, access)
	}
	if err != nil || access.Allowed {
		return err
	}
	return fail(exitDenied, "")
}
