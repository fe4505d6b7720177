package main

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
)

func (a *app) historyCommand() *cobra.Command {
	var sel client.HistorySelection
	var since string
	c := &cobra.Command{
		Use: "history [SRC DST]", Short: "show who changed what, the newest first",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 0 && len(args) != 2 {
				return usage("%s takes SRC DST, or nothing for all; see %s --help", command(c), c.CommandPath())
			}
			return nil
		},
		Long: `history shows every change of intentions that the servers remember: the last
2,000, whoever made them and by whatever command. What one command changed has
one revision, by which "meshctl intention undo" knows it.`,
		Example: "  meshctl intention history web api\n  meshctl intention history --dst api --since 24h",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			if len(args) == 2 {
				if sel.Source != "" || sel.Destination != "" {
					return usage("give SRC DST or --src and --dst, not both")
				}
				sel.Source, sel.Destination = args[0], args[1]
			}
			var err error
			if sel.Since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			if sel.Limit < 0 {
				return usage("--limit %d: write how many, or 0 for all", sel.Limit)
			}
			sel.Source, sel.Destination = a.qualifySource(sel.Source), a.qualify(sel.Destination)
			if sel.Destination == "" {
				sel.Namespace = a.inNamespace()
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			history, err := api.History(cmd.Context(), sel)
			if err != nil {
				return err
			}
			return a.showHistory(history)
		},
	}
	f := c.Flags()
	f.StringVar(&sel.Source, "src", "", "only intentions with this source")
	f.StringVar(&sel.Destination, "dst", "", "only intentions with this destination")
	f.StringVar(&since, "since", "", `only what is newer: "24h", "7d", or a time such as 2026-11-22T02:47:00Z`)
	f.IntVar(&sel.Limit, "limit", 100, "at most so many commands' changes; 0: all")
	return c
}

// parseSince reads how long ago, or when; "" is no time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.Add(-time.Duration(n) * 24 * time.Hour), nil
		}
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, usage(`--since %q: write how long ago, as in 24h or 7d, or a time such as 2026-11-22T02:47:00Z`, text)
	}
	return at, nil
}

func (a *app) showHistory(h client.History) error {
	t := table{columns: []string{"REVISION", "TIME", "BY", "INTENTION", "CHANGE", "BEFORE", "AFTER", "REASON", "WHO", "NOTE"}, wide: 8}
	for _, tr := range h.Transactions {
		revision := strconv.FormatUint(tr.Revision, 10)
		t.names = append(t.names, revision)
		for _, c := range tr.Changes {
			before, after := specText(c.Before), specText(c.After)
			t.rows = append(t.rows, []string{
				revision, a.moment(tr.At), cmp.Or(tr.ByName, tr.By), c.Name, c.Change, before.text, after.text, dash(cmp.Or(after.reason, before.reason)),
				tr.By, dash(tr.Note),
			})
		}
	}
	return a.show(t, h)
}

// moment is a time for people, or in CSV for programs.
func (a *app) moment(t time.Time) string {
	if a.format == "csv" {
		return t.UTC().Format(time.RFC3339)
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// specLine is what a line has room for of an intention.
type specLine struct{ text, reason string }

func specText(spec json.RawMessage) specLine {
	if spec == nil {
		return specLine{text: "-"}
	}
	var i intentions.Intention
	if json.Unmarshal(spec, &i) != nil {
		return specLine{text: "unreadable"}
	}
	text := i.Summary()
	if i.Expires != nil {
		text += ", until " + i.Expires.UTC().Format(time.RFC3339)
	}
	return specLine{text: text, reason: i.Reason}
}

func (a *app) undoCommand() *cobra.Command {
	var req client.UndoRequest
	var w waiter
	c := &cobra.Command{
		Use: "undo REVISION", Short: "restore what was before a change of intentions", Args: exactly(1, "the revision of a change, as history shows it"),
		Long: `undo writes what was before a change, as a new change, which can be undone too.
What one command has changed is restored as a whole or not at all. What was
changed again since is refused, with what it is now: exit 7; --force overwrites.`,
		Example: "  meshctl intention undo 8841 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			var err error
			if req.Revision, err = strconv.ParseUint(args[0], 10, 64); err != nil || req.Revision == 0 {
				return usage("%q is no revision; see meshctl intention history", args[0])
			}
			return a.undo(cmd.Context(), req, w)
		},
	}
	c.Flags().BoolVar(&req.Force, "force", false, "overwrite what was changed again since")
	c.Flags().BoolVar(&req.DryRun, "dry-run", false, "show what would change, write nothing")
	w.flags(c)
	return c
}

func (a *app) undo(ctx context.Context, req client.UndoRequest, w waiter) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	before := start{}
	if w.on && !req.DryRun {
		plan := req
		plan.DryRun = true
		would, err := api.Undo(ctx, plan)
		if err != nil {
			return err
		}
		before = w.before(ctx, api, changedServices(would.Changes))
	}
	result, err := api.Undo(ctx, req)
	if err != nil {
		return err
	}
	if len(result.Changes) == 0 {
		_, err := a.err.Write([]byte("nothing to undo: all is as it was before\n"))
		return err
	}
	if err := a.showUndone(result); err != nil || req.DryRun {
		return err
	}
	return w.wait(ctx, a, api, result.Position, before)
}

// showUndone prints what was restored, with what it is now.
func (a *app) showUndone(r client.Result) error {
	if a.format != "table" && a.format != "wide" {
		return a.showResult(r)
	}
	if err := a.showDiff(r, false); err != nil {
		return err
	}
	return a.showResult(client.Result{Changes: r.Changes, DryRun: r.DryRun})
}

// changedServices are the services that changes of intentions concern.
func changedServices(changes []client.Change) []catalog.Name {
	var names []catalog.Name
	for _, c := range changes {
		var i intentions.Intention
		spec := c.After
		if spec == nil {
			spec = c.Before
		}
		if json.Unmarshal(spec, &i) != nil {
			continue
		}
		for _, n := range servicesOf(i) {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}
