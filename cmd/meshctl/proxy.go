package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/proxy/feed"
)

// restartPatience is more than an agent waits for its proxy.
const restartPatience = 70 * time.Second

func (a *app) proxyRestartCommand() *cobra.Command {
	var socket string
	c := &cobra.Command{
		Use: "restart [PROXY]", Short: "replace the mesh-proxy of this host by a new process, without loss", Args: cobra.MaximumNArgs(1),
		Long: `restart asks the agent of this host, and by it mesh-proxy, to start its program
anew beside the process that runs: after an upgrade that is the new version. The
new process takes the listening sockets over and serves; the old one accepts
nothing more, goes on with what it has, and ends when that is done or its time is
over. If the new one does not serve, the old one serves on, and this says why.

Where systemd runs mesh-proxy, "systemctl reload mesh-proxy" does the same. PROXY is
needed where several proxies are attached to the agent.`,
		Example: "  sudo meshctl proxy restart\n  meshctl proxy status --local",
		RunE: func(cmd *cobra.Command, args []string) error {
			id := ""
			if len(args) > 0 {
				id = args[0]
			}
			return a.restartProxy(cmd.Context(), socket, id)
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			ctx, cancel := context.WithTimeout(cmd.Context(), completionWait)
			defer cancel()
			st, err := localStatus(ctx, socket)
			if err != nil || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return proxyIDs(st), cobra.ShellCompDirectiveNoFileComp
		},
	}
	c.Flags().StringVar(&socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	return c
}

// proxyIDs are the proxies that are attached to an agent.
func proxyIDs(st agent.Status) []string {
	var ids []string
	for _, p := range st.Proxies {
		ids = append(ids, p.Proxy)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

func (a *app) restartProxy(ctx context.Context, socket, id string) error {
	if id == "" {
		st, err := localStatus(ctx, socket)
		if err != nil {
			return err
		}
		switch ids := proxyIDs(st); len(ids) {
		case 0:
			return fail(exitNotFound, "no mesh-proxy is attached to the agent → systemctl status mesh-proxy")
		case 1:
			id = ids[0]
		default:
			return usage("several proxies are attached, name one: %s", strings.Join(ids, ", "))
		}
	}
	var done agent.Restarted
	path := "/v1/agent/proxies/" + url.PathEscape(id) + "/restart"
	if err := localCallWithin(ctx, restartPatience, socket, http.MethodPost, path, &done); err != nil {
		return err
	}
	_, err := fmt.Fprintf(a.out, "proxy %s was restarted, process %d serves; what the one of before still has: meshctl proxy status --local\n", done.Proxy, done.PID)
	return err
}

// localProxies shows the processes of this host's proxies.
func (a *app) localProxies(ctx context.Context, socket string, watch bool) error {
	read := func() (agent.Status, table, error) {
		st, err := localStatus(ctx, socket)
		return st, processTable(st.Proxies, time.Now()), err
	}
	if watch {
		return a.poll(ctx, func() (table, []any, error) {
			st, t, err := read()
			return t, anys(st.Proxies), err
		})
	}
	st, t, err := read()
	if err != nil {
		return err
	}
	if err := a.show(t, st.Proxies); err != nil {
		return err
	}
	for _, p := range st.Proxies {
		if p.Refused != "" {
			return fail(exitDenied, "")
		}
	}
	return nil
}

func processTable(processes []feed.ProxyStatus, now time.Time) table {
	t := table{columns: []string{"PROXY", "PID", "STATE", "VERSION", "PLAN", "OPEN", "CUT IN", "REFUSED BECAUSE"}}
	for _, p := range processes {
		cut := ""
		if p.State == feed.Draining {
			cut = cutIn(p, now)
		}
		t.names = append(t.names, "proxy/"+p.Proxy+"/"+strconv.Itoa(p.PID))
		t.rows = append(t.rows, []string{
			p.Proxy, strconv.Itoa(p.PID), string(p.State), dash(p.Version), strconv.FormatUint(p.Applied.Revision, 10), strconv.Itoa(p.Open),
			dash(cut), dash(p.Refused),
		})
	}
	return t
}

// cutIn says how long a draining process waits for what it has.
func cutIn(p feed.ProxyStatus, now time.Time) string {
	if p.Until.IsZero() {
		return "never"
	}
	return max(p.Until.Sub(now), 0).Round(time.Second).String()
}
