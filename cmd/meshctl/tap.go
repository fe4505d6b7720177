package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/client"
)

// watchFlags are those of the commands that show what the proxies see.
type watchFlags struct {
	src, dst string
	local    bool
	socket   string
}

func (f *watchFlags) define(a *app, c *cobra.Command) {
	c.Flags().StringVar(&f.src, "src", "", "only of this source: SERVICE, NAMESPACE/SERVICE, NAMESPACE/* or a SPIFFE ID")
	c.Flags().StringVar(&f.dst, "dst", "", "only to this destination, likewise")
	for _, flag := range []string{"src", "dst"} {
		_ = c.RegisterFlagCompletionFunc(flag, a.complete(client.KindService)) // the flag was just defined
	}
	f.defineLocal(c)
}

func (f *watchFlags) defineLocal(c *cobra.Command) {
	c.Flags().BoolVar(&f.local, "local", false, "ask the agent of this host, about its own proxies only; needs no token and no server")
	c.Flags().StringVar(&f.socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
}

// observer is who can tell what proxies see.
type observer struct {
	*client.Client
	local bool
	// spare is the host's agent, for when no server answers; nil if there is none.
	spare *client.Client
}

// observe finds the servers or, if that is asked for or there is nothing else, the
// agent of this host.
func (a *app) observe(f watchFlags) (*observer, error) {
	if err := a.checkFormat(); err != nil {
		return nil, err
	}
	here, err := client.New(client.Config{Address: "unix://" + f.socket})
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(f.socket); err != nil {
		if f.local {
			return nil, fail(exitUnreachable, "the agent's socket %s: %v; does the agent run?", f.socket, errors.Unwrap(err))
		}
		here = nil
	}
	if f.local {
		return &observer{Client: here, local: true}, nil
	}
	api, err := a.client()
	if err != nil {
		if exitCode(err) == exitUnreachable && here != nil {
			return &observer{Client: here, local: true}, nil
		}
		return nil, err
	}
	return &observer{Client: api, spare: here}, nil
}

// fallBack turns to the agent of this host, if there is one and err is that no
// server answers, and says so.
func (o *observer) fallBack(a *app, err error) bool {
	code := client.CodeOf(err)
	if o.spare == nil || code != client.CodeUnreachable && code != client.CodeUnavailable {
		return false
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	a.note("%s; asking this host's agent, which knows its own proxies only", text)
	o.Client, o.local, o.spare = o.spare, true, nil
	return true
}

// note tells people something beside the data. If it can't be written, the data
// can't be, either.
func (a *app) note(format string, args ...any) {
	_, _ = fmt.Fprintln(a.err, printable(fmt.Sprintf(format, args...)))
}

func (a *app) tapCommand() *cobra.Command {
	var f watchFlags
	var q flow.Query
	var limit int
	c := &cobra.Command{
		Use: "tap", Short: "show requests and TCP sessions as they end", Args: exactly(0, "no arguments"),
		Long: `tap shows requests and TCP sessions live, as the proxies see them: who called whom,
what became of it, and for what is denied the id that "meshctl explain id:ID"
explains. Headers, queries and bodies are never seen. It costs something only while
it runs; what you do not read fast enough is dropped and counted, traffic never
waits.

A request is shown once, as its destination's proxy saw it; of the caller's side
only what was not sent on. --both shows both sides. It needs the permission
service:tap, or root or the group mesh on a host for what that host's own proxies
see.`,
		Example: "  meshctl tap --src web --dst api\n  meshctl tap --dst api --status 5xx --path /v1/ -o json\n  sudo meshctl tap --local",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.observe(f)
			if err != nil {
				return err
			}
			q.Source, q.Destination = a.sides(f)
			q.Want = flow.Records
			if err := q.Validate(); err != nil {
				return usage("%v", err)
			}
			return a.tap(cmd.Context(), o, q, limit)
		},
	}
	f.define(a, c)
	c.Flags().StringVar(&q.Status, "status", "", "only this status, 403, or class, 5xx")
	c.Flags().StringVar(&q.Method, "method", "", "only this method")
	c.Flags().StringVar(&q.Path, "path", "", "only paths that begin so")
	c.Flags().BoolVar(&q.Denied, "denied", false, "only what was denied or refused")
	c.Flags().BoolVar(&q.Both, "both", false, "show what both proxies saw of a request")
	c.Flags().IntVar(&limit, "limit", 0, "end after so many")
	c.Flags().BoolP("follow", "f", true, "go on until interrupted, as it does anyway unless --limit is given")
	return c
}

// sides puts bare names into the namespace that is asked for, which stands for all
// its destinations where no side is named, as it does in lists.
func (a *app) sides(f watchFlags) (source, destination string) {
	if ns := a.inNamespace(); ns != "" && f.src == "" && f.dst == "" {
		return "", ns + "/*"
	}
	if f.src != "" {
		source = a.qualify(f.src)
	}
	if f.dst != "" {
		destination = a.qualify(f.dst)
	}
	return source, destination
}

// errShown ends a tap that has shown as much as it should.
var errShown = errors.New("enough was shown")

// tap shows records until the command is interrupted, or limit of them are shown. A
// connection that breaks is made again.
func (a *app) tap(ctx context.Context, o *observer, q flow.Query, limit int) error {
	p := &recordPrinter{app: a}
	shown := 0
	err := a.follow(ctx, o, func(o *observer, take func(flow.Answer) error) error {
		asked := q
		asked.Both = q.Both || o.local // a host alone sees but one side of most
		return each(o.Tap(ctx, asked), take)
	}, func(piece flow.Answer) error {
		if err := p.head(); err != nil {
			return err
		}
		for i := range piece.Records {
			if err := p.record(&piece.Records[i]); err != nil {
				return err
			}
			if shown++; limit > 0 && shown >= limit {
				return errShown
			}
		}
		return nil
	})
	if errors.Is(err, errShown) {
		return nil
	}
	return err
}

// each hands take what a stream yields.
func each(stream func(func(flow.Answer, error) bool), take func(flow.Answer) error) error {
	for piece, err := range stream {
		if err == nil {
			err = take(piece)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// follow runs a stream of answers until the command is interrupted or take fails,
// again when it breaks, and tells what the answers say beside their content.
func (a *app) follow(ctx context.Context, o *observer, stream func(*observer, func(flow.Answer) error) error, take func(flow.Answer) error) error {
	begun, broken := false, false
	for {
		err := stream(o, func(piece flow.Answer) error {
			if piece.Caught && !begun || piece.Caught && broken {
				begun, broken = true, false
				a.noteHosts(o, piece)
			}
			if piece.Dropped > 0 {
				a.note("%d more were not shown: too many to show", piece.Dropped)
			}
			return take(piece)
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // being interrupted is how this ends
		}
		switch code := client.CodeOf(err); {
		case !begun && o.fallBack(a, err):
			continue
		case !begun || code != client.CodeUnreachable && code != client.CodeUnavailable:
			return err
		case !broken:
			broken = true
			text, _, _ := strings.Cut(err.Error(), "\n")
			a.note("%s; trying again", text)
		}
		timer := time.NewTimer(rewatch)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// noteHosts says who is watched.
func (a *app) noteHosts(o *observer, piece flow.Answer) {
	switch {
	case o.local:
		a.note("watching the proxies of this host")
	case piece.Hosts == 0:
		a.note("no connected host runs or calls that; waiting for one")
	case piece.Hosts == 1:
		a.note("watching 1 host")
	default:
		a.note("watching %d hosts", piece.Hosts)
	}
	for _, host := range piece.Silent {
		a.note("not watched: %s", host)
	}
}

// recordPrinter shows records one by one.
type recordPrinter struct {
	*app
	begun  bool
	widths []int
	csv    *csv.Writer
}

var recordColumns = []string{
	"TIME", "SOURCE", "DESTINATION", "REQUEST", "RESULT", "TOOK", "ID", "SIDE", "NODE", "INSTANCE", "PEER", "SENT", "RECEIVED", "INTENTION",
}

// recordWide is from which column on -o wide shows more.
const recordWide = 7

// head shows the header of a table before anything comes.
func (p *recordPrinter) head() error {
	if p.begun {
		return nil
	}
	p.begun = true
	switch p.format {
	case "csv":
		p.csv = csv.NewWriter(p.out)
		return p.line(lower(recordColumns))
	case "table", "wide":
		// As wide as most of what will come, so that columns seldom move.
		p.widths = []int{12, 12, 12, 24, 14, 7, 6, 8, 8, 8, 17, 6, 8}
		return p.line(recordColumns)
	default:
		return nil
	}
}

func (p *recordPrinter) record(r *flow.Record) error {
	switch p.format {
	case "json":
		enc := json.NewEncoder(p.out)
		enc.SetEscapeHTML(false)
		return enc.Encode(r)
	case "yaml":
		if _, err := fmt.Fprintln(p.out, "---"); err != nil {
			return err
		}
		return p.show(table{}, r)
	case "name":
		_, err := fmt.Fprintln(p.out, recordName(r))
		return err
	default:
		return p.line(recordRow(r, p.format == "csv"))
	}
}

func (p *recordPrinter) line(cells []string) error {
	if p.csv != nil {
		return p.csv.WriteAll([][]string{cells})
	}
	if p.format != "wide" {
		cells = cells[:recordWide]
	}
	var b strings.Builder
	for n, cell := range cells {
		if n == len(p.widths) {
			p.widths = append(p.widths, 0)
		}
		width := utf8.RuneCountInString(cell)
		p.widths[n] = max(p.widths[n], width)
		b.WriteString(cell)
		if n < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", p.widths[n]-width+2))
		}
	}
	_, err := fmt.Fprintln(p.out, strings.TrimRight(b.String(), " "))
	return err
}

func recordName(r *flow.Record) string {
	if r.ErrorID != "" {
		return "id:" + r.ErrorID
	}
	return string(r.Kind) + "/" + flow.Short(r.Source, "") + "/" + flow.Short(r.Destination, "")
}

// recordRow is a record as people read it; in CSV times are whole and identities
// stay what they are.
func recordRow(r *flow.Record, exact bool) []string {
	source, destination, at := flow.Short(r.Source, ""), flow.Short(r.Destination, ""), r.Time.Local().Format("15:04:05.000")
	if exact {
		source, destination, at = r.Source.String(), r.Destination.String(), r.Time.UTC().Format(time.RFC3339Nano)
	}
	request := "TCP"
	if r.Kind == flow.HTTP {
		request = strings.TrimSpace(r.Method + " " + r.Path)
		if request == "" {
			request = "HTTP"
		}
	}
	cells := []string{
		at, source, destination, request, result(r), took(r), r.ErrorID, string(r.Direction), r.Node, r.Endpoint, r.Peer,
		strconv.FormatInt(r.Sent, 10), strconv.FormatInt(r.Received, 10), r.Intention,
	}
	for i, cell := range cells {
		cells[i] = printable(cell)
		if !exact {
			cells[i] = dash(cells[i])
		}
	}
	return cells
}

// result says in a word or two what became of it.
func result(r *flow.Record) string {
	var words []string
	if r.Status != 0 {
		words = append(words, strconv.Itoa(r.Status))
	}
	if r.GRPC != "" {
		words = append(words, r.GRPC)
	}
	switch {
	case r.Verdict == flow.Refused:
		words = append(words, "refused", r.Reason)
	case r.Reason != "":
		words = append(words, r.Reason)
	case r.Opened:
		words = append(words, "opened")
	case r.Kind == flow.TCP:
		words = append(words, "closed")
	case r.Status == 0:
		words = append(words, "no response")
	}
	return strings.Join(words, " ")
}

func took(r *flow.Record) string {
	d := time.Duration(r.DurationMS * float64(time.Millisecond))
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.2fms", r.DurationMS)
	case d < time.Second:
		return fmt.Sprintf("%.1fms", r.DurationMS)
	default:
		return d.Round(10 * time.Millisecond).String()
	}
}

// printable replaces what a terminal could take for a command: paths and names come
// from strangers.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return '�'
	}, s)
}
