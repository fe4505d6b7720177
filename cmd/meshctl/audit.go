package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/audit"
	"github.com/meshd/meshd/server/client"
)

// auditDir is where a server keeps its log unless server.hcl says otherwise.
const auditDir = "/var/lib/meshd/server/audit"

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{Use: "audit", Short: "who asked the servers for what, and what became of it", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.auditListCommand(), a.auditTailCommand(), a.auditVerifyCommand())
	return c
}

// auditFlags select records.
type auditFlags struct {
	client.AuditQuery
	since string
}

func (f *auditFlags) define(c *cobra.Command, limit int) {
	c.Flags().StringVar(&f.Who, "who", "", `only of this caller: "token:9f3a66f01b77c2d4", or what people call it`)
	c.Flags().StringVar(&f.Kind, "kind", "", "only about this: intention, node, token, snapshot …")
	c.Flags().StringVar(&f.Outcome, "outcome", "", "only allowed, denied or failed ones")
	c.Flags().StringVar(&f.RequestID, "request", "", "only this request, by the ID that its caller was told")
	c.Flags().StringVar(&f.Server, "server", "", "only of this server's log")
	c.Flags().StringVar(&f.since, "since", "", "nothing older: 24h, 7d, or a time such as 2026-11-22T02:47:00Z")
	c.Flags().IntVar(&f.Limit, "limit", limit, "at most so many, the newest")
	_ = c.RegisterFlagCompletionFunc("outcome", cobra.FixedCompletions([]string{"allowed", "denied", "failed"}, cobra.ShellCompDirectiveNoFileComp)) // the flag was just defined
}

func (f *auditFlags) query() (client.AuditQuery, error) {
	var err error
	if f.Since, err = parseSince(f.since, time.Now()); err != nil {
		return f.AuditQuery, err
	}
	if f.Limit < 1 || f.Limit > client.MaxAudit {
		return f.AuditQuery, usage("--limit %d: write 1 to %d", f.Limit, client.MaxAudit)
	}
	return f.AuditQuery, nil
}

func (a *app) auditListCommand() *cobra.Command {
	var f auditFlags
	c := &cobra.Command{
		Use: "list", Short: "list records, the newest last", Args: exactly(0, "no arguments"),
		Long: `list shows what the servers have recorded: each change, each denial, and each read
of what is secret. It needs the permission audit:read.`,
		Example: "  meshctl audit list --since 24h --kind intention\n  meshctl audit list --outcome denied -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			q, err := f.query()
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			answer, err := api.Audit(cmd.Context(), q)
			if err != nil {
				return err
			}
			a.noteSilent(answer)
			t := table{columns: auditColumns, wide: auditWide}
			for i := range answer.Records {
				t.rows = append(t.rows, auditRow(&answer.Records[i], a.format == "csv"))
				t.names = append(t.names, auditName(&answer.Records[i]))
			}
			return a.show(t, answer.Records)
		},
	}
	f.define(c, 100)
	return c
}

func (a *app) noteSilent(answer client.AuditLog) {
	for _, server := range answer.Silent {
		a.note("not asked: %s", server)
	}
}

func (a *app) auditTailCommand() *cobra.Command {
	var f auditFlags
	var follow bool
	c := &cobra.Command{
		Use: "tail", Short: "show the newest records, and with -f those that come", Args: exactly(0, "no arguments"),
		Example: "  meshctl audit tail -f --outcome denied",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			q, err := f.query()
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			p := &auditPrinter{app: a, seen: map[string]uint64{}}
			if follow {
				return a.followAudit(cmd.Context(), api, q, p)
			}
			answer, err := api.Audit(cmd.Context(), q)
			if err != nil {
				return err
			}
			a.noteSilent(answer)
			return p.print(answer.Records)
		},
	}
	f.define(c, 20)
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	return c
}

// followAudit follows the log until it is interrupted, and begins again where it was
// when the connection breaks.
func (a *app) followAudit(ctx context.Context, api *client.Client, q client.AuditQuery, p *auditPrinter) error {
	for begun, broken := false, false; ; {
		var last error
		for answer, err := range api.FollowAudit(ctx, q) {
			if last = err; err != nil {
				break
			}
			begun, broken = true, false
			a.noteSilent(answer)
			if err := p.print(answer.Records); err != nil {
				return err
			}
			if n := len(answer.Records); n > 0 {
				q.Since, q.Limit = answer.Records[n-1].Time.Add(-time.Minute), client.MaxAudit
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if code := client.CodeOf(last); !begun || code != client.CodeUnreachable && code != client.CodeUnavailable {
			return last
		}
		if !broken {
			broken = true
			text, _, _ := strings.Cut(last.Error(), "\n")
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

// auditPrinter prints records one by one, each once.
type auditPrinter struct {
	*app
	seen   map[string]uint64 // the newest of each server
	widths []int
}

func (p *auditPrinter) print(records []client.AuditRecord) error {
	if p.widths == nil {
		p.widths = []int{19, 16, 40, 16, 8, 16, 8, 4, 15, 30}
		if p.format != "json" && p.format != "yaml" && p.format != "name" {
			if err := p.line(auditColumns); err != nil {
				return err
			}
		}
	}
	for i := range records {
		r := &records[i]
		if r.Seq <= p.seen[r.Server] {
			continue
		}
		p.seen[r.Server] = r.Seq
		if err := p.record(r); err != nil {
			return err
		}
	}
	return nil
}

func (p *auditPrinter) record(r *client.AuditRecord) error {
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
		_, err := fmt.Fprintln(p.out, auditName(r))
		return err
	default:
		return p.line(auditRow(r, p.format == "csv"))
	}
}

func (p *auditPrinter) line(cells []string) error {
	if p.format == "csv" {
		if cells[0] == auditColumns[0] {
			cells = lower(cells)
		}
		return csv.NewWriter(p.out).WriteAll([][]string{cells})
	}
	if p.format != "wide" {
		cells = cells[:auditWide]
	}
	var b strings.Builder
	for n, cell := range cells {
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

var auditColumns = []string{"TIME", "WHO", "WHAT", "OUTCOME", "REVISION", "REQUEST", "SERVER", "SEQ", "REMOTE", "ROUTE"}

// auditWide is from which column on -o wide shows more.
const auditWide = 6

func auditName(r *client.AuditRecord) string { return r.Server + "/" + strconv.FormatUint(r.Seq, 10) }

// auditRow is a record as people read it; in CSV times are whole.
func auditRow(r *client.AuditRecord, exact bool) []string {
	at := r.Time.Local().Format(time.DateTime)
	if exact {
		at = r.Time.UTC().Format(time.RFC3339Nano)
	}
	who, outcome, revision, route := r.Who, r.Outcome, "", ""
	if r.Title != "" && !exact {
		who = r.Title
	}
	if r.Code != "" {
		outcome += ": " + string(r.Code)
	}
	if r.Revision > 0 {
		revision = strconv.FormatUint(r.Revision, 10)
	}
	if r.Method != "" {
		route = r.Method + " " + r.Route
	}
	return []string{
		at, dash(printable(who)), printable(auditWhat(r)), dash(outcome), dash(revision), dash(r.RequestID),
		r.Server, strconv.FormatUint(r.Seq, 10), dash(r.Remote), dash(route),
	}
}

// auditWhat says what a record is about.
func auditWhat(r *client.AuditRecord) string {
	if r.Event != client.AuditRequest {
		text := "log " + string(r.Event)
		if r.Count > 0 {
			text += " " + strconv.FormatUint(r.Count, 10)
		}
		if r.Detail != "" {
			text += " (" + r.Detail + ")"
		}
		return text
	}
	if len(r.Changes) > 0 {
		c := r.Changes[0]
		text := string(c.Kind) + " " + c.Name + " " + c.Change
		if more := len(r.Changes) - 1 + r.Omitted; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
		return text
	}
	text := r.Verb + " " + r.Resource
	if r.Name != "" {
		text += " " + r.Name
		if r.Namespace != "" {
			text = r.Verb + " " + r.Resource + " " + r.Namespace + "/" + r.Name
		}
	} else if r.Namespace != "" {
		text += " in " + r.Namespace
	}
	return text
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var keyFile string
	var atLeast uint64
	c := &cobra.Command{
		Use: "verify [DIR|FILE]", Short: "prove that the files of a server's audit log are as they were written", Args: cobra.MaximumNArgs(1),
		Long: `verify follows the chain of records through the files of one server, by default
those in ` + auditDir + `, without a server. It names the first
line that was edited, inserted, moved or removed; exit code 3.

Without --cluster-key it can't tell a chain that was computed anew. What was cut
off at the end does not show in the files: give --at-least a number that you know,
such as the newest in another copy, or of the metric mesh_server_audit_sequence.`,
		Example: "  sudo meshctl audit verify --cluster-key /etc/meshd/cluster.key --at-least 10412",
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			dir := auditDir
			if len(args) == 1 {
				dir = args[0]
			}
			return a.verifyAudit(dir, keyFile, atLeast)
		},
	}
	c.Flags().StringVar(&keyFile, "cluster-key", "", "file with the cluster key: prove who wrote each record")
	c.Flags().Uint64Var(&atLeast, "at-least", 0, "the number that the newest record has at least")
	_ = c.MarkFlagFilename("cluster-key") // the flag was just defined
	return c
}

func (a *app) verifyAudit(dir, keyFile string, atLeast uint64) error {
	var key ca.Secret
	if keyFile != "" {
		cluster, err := ca.ReadClusterKey(keyFile)
		if err != nil {
			return usage("--cluster-key: %v", err)
		}
		if key, err = cluster.Derive("audit"); err != nil {
			return err
		}
	}
	report, err := audit.Verify(dir, key)
	switch {
	case errors.Is(err, audit.ErrBroken):
		return fail(exitDenied, "%v", err)
	case err != nil:
		return err
	case report.Last < atLeast:
		return fail(exitDenied, "%s ends with record %d, and %d was written: the end was cut off, or these are not all files", dir, report.Last, atLeast)
	}
	if a.format != "table" && a.format != "wide" {
		return a.show(table{}, report)
	}
	how := "the chain is unbroken; with --cluster-key FILE verify also proves who wrote it"
	if report.Signed {
		how = "the chain is unbroken, and each record is signed with the cluster key"
	}
	end := "the log is open, or its server was killed"
	if report.Closed {
		end = "the server ended it"
	}
	if report.Unfinished > 0 {
		end += fmt.Sprintf("; %d bytes of a begun record follow", report.Unfinished)
	}
	_, err = fmt.Fprintf(a.out, "%s: %s\nserver %s, %d files, records %d to %d, %s to %s; %s\n", dir, how, report.Server, report.Files, report.First, report.Last,
		report.From.Local().Format(time.DateTime), report.To.Local().Format(time.DateTime), end)
	return err
}
