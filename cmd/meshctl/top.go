package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
)

// topOptions say what top shows.
type topOptions struct {
	interval time.Duration
	once     bool
	edges    bool
	limit    int
}

func (a *app) topCommand() *cobra.Command {
	var f watchFlags
	var opt topOptions
	c := &cobra.Command{
		Use: "top", Short: "show live what each service does: requests, success, latency, denials", Args: exactly(0, "no arguments"),
		Long: `top shows what passes to each service, or between each two with --edges: requests
per second, the share that succeeded, latency, denials, and TCP sessions. It counts
each request once, as the destination's proxy saw it, and from the caller's side
what never got there: denied by the caller's own proxy, or without a healthy
instance.

SUCCESS leaves out what was denied, answered with 5xx, or got no response. Latency
is from the first byte of a request to the last of its response, interpolated in the
buckets of mesh_request_duration_seconds. --once shows one table and ends, for
scripts; with -o json each interval is one line of JSON.`,
		Example: "  meshctl top\n  meshctl top --edges --dst api\n  meshctl top --once -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.observe(f)
			if err != nil {
				return err
			}
			q := flow.Query{Want: flow.Edges, Interval: catalog.Duration(opt.interval)}
			q.Source, q.Destination = a.sides(f)
			if err := q.Validate(); err != nil {
				return usage("%v", err)
			}
			return a.top(cmd.Context(), o, q, opt)
		},
	}
	f.define(a, c)
	c.Flags().DurationVar(&opt.interval, "interval", 2*time.Second, "between two looks, 500ms to 1m")
	c.Flags().BoolVar(&opt.once, "once", false, "show one table and end")
	c.Flags().BoolVar(&opt.edges, "edges", false, "show pairs of source and destination")
	c.Flags().IntVar(&opt.limit, "limit", 0, "at most so many lines")
	return c
}

// top gathers samples, and shows the board once per interval.
func (a *app) top(ctx context.Context, o *observer, q flow.Query, opt topOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pieces, ended := make(chan flow.Answer), make(chan error, 1)
	go func() {
		ended <- a.follow(ctx, o, func(o *observer, take func(flow.Answer) error) error {
			return each(o.Top(ctx, q), take)
		}, func(piece flow.Answer) error {
			select {
			case pieces <- piece:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	var board flow.Board
	begun := time.Now()
	tick := time.NewTicker(opt.interval)
	defer tick.Stop()
	// What answers late is not waited for more than this.
	patience := 2*opt.interval + 4*time.Second
	caught, hosts := false, 0
	for {
		select {
		case piece := <-pieces:
			if piece.Sample != nil {
				board.Add(*piece.Sample, time.Now())
			}
			if piece.Caught && piece.Sample == nil {
				caught, hosts = true, piece.Hosts
			}
			if nobody := caught && hosts == 0 && !o.local; opt.once && (caught && board.Ready() || nobody) {
				return a.showBoard(&board, opt)
			}
		case now := <-tick.C:
			board.Forget(now.Add(-3*opt.interval - time.Second))
			if opt.once {
				if now.Sub(begun) > patience {
					return a.showBoard(&board, opt)
				}
				continue
			}
			if err := a.refresh(&board, opt); err != nil {
				return err
			}
		case err := <-ended:
			return err
		}
	}
}

// refresh shows the board again: in the place of the last one on a terminal, else
// below it.
func (a *app) refresh(board *flow.Board, opt topOptions) error {
	if a.format == "json" {
		enc := json.NewEncoder(a.out)
		enc.SetEscapeHTML(false)
		return enc.Encode(boardRows(board, opt))
	}
	rows, columns, terminal := terminalSize(a.out)
	if !terminal || a.format != "table" && a.format != "wide" {
		return a.showBoard(board, opt)
	}
	shown := boardRows(board, opt)
	more := ""
	if room := rows - 3; room > 0 && len(shown) > room {
		more = fmt.Sprintf(", %d more lines than fit", len(shown)-room)
		shown = shown[:room]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "meshctl top, every %s, %s%s; Ctrl-C ends\n\n", opt.interval, time.Now().Format("15:04:05"), more)
	if err := a.writeTable(&b, boardTable(shown, opt)); err != nil {
		return err
	}
	// Home; each line and what was below is cleared as it is written, so that nothing flickers (ECMA-48, 8.3.21, 8.3.41, 8.3.39).
	var screen strings.Builder
	screen.WriteString("\x1b[H")
	for line := range strings.Lines(b.String()) {
		screen.WriteString(clip(strings.TrimRight(line, "\n"), columns) + "\x1b[K\n")
	}
	screen.WriteString("\x1b[J")
	_, err := fmt.Fprint(a.out, screen.String())
	return err
}

func (a *app) showBoard(board *flow.Board, opt topOptions) error {
	rows := boardRows(board, opt)
	return a.show(boardTable(rows, opt), rows)
}

func boardRows(board *flow.Board, opt topOptions) []flow.Row {
	rows := board.Rows(opt.edges)
	if opt.limit > 0 && len(rows) > opt.limit {
		rows = rows[:opt.limit]
	}
	return rows
}

func boardTable(rows []flow.Row, opt topOptions) table {
	t := table{columns: []string{"DESTINATION", "RPS", "SUCCESS", "P50", "P95", "P99", "DENIED/S", "TCP OPEN", "TCP/S", "BYTES/S OUT", "BYTES/S IN"}, wide: 8}
	if opt.edges {
		t.columns, t.wide = append([]string{"SOURCE"}, t.columns...), t.wide+1
	} else {
		t.columns[0] = "SERVICE"
	}
	for _, r := range rows {
		success := "-"
		if r.Success != nil {
			success = fmt.Sprintf("%.1f%%", *r.Success*100)
		}
		name := other(flow.Short(r.Destination, ""))
		cells := []string{
			name, rate(r.Requests), success, millis(r.P50), millis(r.P95), millis(r.P99), rate(r.Denied),
			strconv.FormatInt(r.Open, 10), rate(r.Sessions), bytesRate(r.Sent), bytesRate(r.Received),
		}
		if opt.edges {
			source := other(flow.Short(r.Source, ""))
			cells, name = append([]string{source}, cells...), source+" → "+name
		}
		for i := range cells {
			cells[i] = printable(cells[i])
		}
		t.rows, t.names = append(t.rows, cells), append(t.names, printable(name))
	}
	return t
}

// other is what is counted together when there are too many pairs.
func other(name string) string {
	if name == "?" {
		return "other"
	}
	return name
}

func rate(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	default:
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
}

func bytesRate(v float64) string {
	units := []string{"", "K", "M", "G"}
	n := 0
	for v >= 1000 && n < len(units)-1 {
		v, n = v/1000, n+1
	}
	return rate(v) + units[n]
}

func millis(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v >= 1000:
		return strconv.FormatFloat(*v/1000, 'f', 2, 64) + "s"
	default:
		return strconv.FormatFloat(*v, 'f', 1, 64) + "ms"
	}
}

// clip cuts a line to what the terminal shows; 0 columns are any number.
func clip(s string, columns int) string {
	if r := []rune(s); columns > 0 && len(r) > columns {
		return string(r[:columns])
	}
	return s
}

// terminalSize reports whether out is a terminal, and its size.
func terminalSize(out any) (rows, columns int, ok bool) {
	f, isFile := out.(*os.File)
	if !isFile {
		return 0, 0, false
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var size *unix.Winsize
	failed := errors.New("not asked")
	err = raw.Control(func(fd uintptr) { size, failed = unix.IoctlGetWinsize(int(fd), unix.TIOCGWINSZ) })
	if err != nil || failed != nil {
		return 0, 0, false
	}
	return int(size.Row), int(size.Col), true
}
