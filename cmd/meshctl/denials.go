package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/client"
)

func (a *app) denialsCommand() *cobra.Command {
	var f watchFlags
	var q flow.Query
	var since string
	var follow bool
	c := &cobra.Command{
		Use: "denials", Short: "show what was denied, the newest first", Args: exactly(0, "no arguments"),
		Long: `denials shows what was denied by policy, and who was refused on the mesh port
because he did not prove who he is. Each proxy keeps its newest 1,024 denials, and
256 of strangers, until it ends; a caller whom no intention allows is denied by his
own proxy, and listed, too. With --failed it also shows what proxies answered with
an error of their own.

It needs the permission service:tap, or root or the group mesh on a host for what
that host's own proxies know.`,
		Example: "  meshctl denials --dst api --since 10m\n  meshctl denials -f\n  sudo meshctl denials --local",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.observe(f)
			if err != nil {
				return err
			}
			q.Want = flow.Denials
			q.Source, q.Destination = a.sides(f)
			if q.Since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			if err := q.Validate(); err != nil {
				return usage("%v", err)
			}
			if follow {
				return a.followDenials(cmd.Context(), o, q)
			}
			return a.listDenials(cmd.Context(), o, q)
		},
	}
	f.define(a, c)
	c.Flags().BoolVar(&q.Failed, "failed", false, "also show what proxies failed by themselves")
	c.Flags().StringVar(&since, "since", "", "nothing older: a duration such as 10m, or a time such as 2026-03-01T09:00:00Z")
	c.Flags().IntVar(&q.Limit, "limit", 0, "at most so many of those that are kept; 100 if not given")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "show the kept ones, the oldest first, and then all that come")
	return c
}

// denials asks, and asks the host's agent if no server answers.
func (a *app) denials(ctx context.Context, o *observer, q flow.Query) (flow.Answer, error) {
	answer, err := o.Denials(ctx, q)
	if err != nil && o.fallBack(a, err) {
		answer, err = o.Denials(ctx, q)
	}
	if err != nil {
		return answer, err
	}
	for _, host := range answer.Silent {
		a.note("not asked: %s", host)
	}
	if k := answer.Kept; !k.Since.IsZero() {
		a.note("the proxies keep their newest %d; of before %s some are gone", k.Records, k.Since.Local().Format("15:04:05"))
	}
	return answer, nil
}

func (a *app) listDenials(ctx context.Context, o *observer, q flow.Query) error {
	answer, err := a.denials(ctx, o, q)
	if err != nil {
		return err
	}
	t := table{columns: recordColumns, wide: recordWide}
	for i := range answer.Records {
		r := &answer.Records[i]
		t.rows = append(t.rows, recordRow(r, a.format == "csv"))
		t.names = append(t.names, recordName(r))
	}
	return a.show(t, append([]flow.Record{}, answer.Records...))
}

// followDenials shows what is kept and then what comes, with nothing missed in
// between: it watches before it lists.
func (a *app) followDenials(ctx context.Context, o *observer, q flow.Query) error {
	tapped := flow.Query{Want: flow.Records, Source: q.Source, Destination: q.Destination, Denied: true, Failed: q.Failed}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pieces, ended := make(chan flow.Answer, 64), make(chan error, 1)
	go func() {
		ended <- a.follow(ctx, o, func(o *observer, take func(flow.Answer) error) error {
			return each(o.Tap(ctx, tapped), take)
		}, func(piece flow.Answer) error {
			select {
			case pieces <- piece:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	var early []flow.Record
	for caught := false; !caught; {
		select {
		case piece := <-pieces:
			early, caught = append(early, piece.Records...), piece.Caught
		case err := <-ended:
			return err
		}
	}
	answer, err := a.denials(ctx, &observer{Client: o.Client, local: o.local}, q)
	if err != nil {
		return err
	}
	p := &recordPrinter{app: a}
	if err := p.head(); err != nil {
		return err
	}
	shown := map[string]bool{}
	show := func(r *flow.Record) error {
		key := r.Node + "/" + r.ErrorID
		if shown[key] {
			delete(shown, key) // it comes once from what is kept, and once live
			return nil
		}
		return p.record(r)
	}
	slices.Reverse(answer.Records)
	for i := range answer.Records {
		if err := p.record(&answer.Records[i]); err != nil {
			return err
		}
		shown[answer.Records[i].Node+"/"+answer.Records[i].ErrorID] = true
	}
	for piece := (flow.Answer{Records: early}); ; {
		for i := range piece.Records {
			if err := show(&piece.Records[i]); err != nil {
				return err
			}
		}
		select {
		case piece = <-pieces:
		case err := <-ended:
			return err
		}
	}
}

// explainID explains what a client was told the id of. This host's agent is asked,
// too, if there is one: it may be cut off from the servers.
func (a *app) explainID(ctx context.Context, o *observer, id string) error {
	if !flow.ValidID(id) {
		return usage("%q is no mesh-error-id: it has six hexadecimal digits, in lower case", id)
	}
	e, err := o.ExplainID(ctx, id)
	if err != nil && o.spare != nil {
		here, unknown := o.spare, client.CodeOf(err) == client.CodeNotFound
		if unknown || o.fallBack(a, err) {
			own, failed := here.ExplainID(ctx, id)
			if failed == nil || !unknown {
				e, err = own, failed
			}
		}
	}
	if err != nil {
		return err
	}
	for i := range e.Facts {
		e.Facts[i].Text = printable(e.Facts[i].Text)
	}
	for i := range e.Next {
		e.Next[i] = printable(e.Next[i])
	}
	given := 0
	for _, r := range e.Records {
		if r.Verdict != flow.Passed {
			given++
		}
	}
	if given > 1 {
		a.note("by chance %d requests have this id; the newest is explained, -o json shows all", given)
	}
	return a.showExplanation(e)
}
