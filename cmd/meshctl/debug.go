package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/server/client"
)

func (a *app) debugCommand() *cobra.Command {
	var out, socket string
	c := &cobra.Command{
		Use: "debug", Short: "write a support bundle, without secrets, to a file", Args: exactly(0, "no arguments; see --out"),
		Long: `debug gathers what somebody needs to understand a fault who has no access: versions,
settings, plan, certificates without their keys, what the servers have told, what
check finds, metrics, profiles of agent and server, the last lines of the logs,
limits of the kernel.

On a host it asks the agent, which needs neither token nor server; where a server
can be reached, it adds the catalog. What could not be had is listed in skipped.txt.
Every file is made of what is known to be no secret; tokens and keys are in none of
them. Names, addresses and your rules are: look before you hand it on.`,
		Example: "  sudo meshctl debug\n  meshctl debug --out - | tar tz",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.debug(cmd, out, socket)
		},
	}
	c.Flags().StringVar(&out, "out", "", "the file to write, - for standard output; meshd-debug-HOST-TIME.tar.gz if not given")
	c.Flags().StringVar(&socket, "agent-socket", agent.DefaultSocket, "the agent's socket")
	_ = c.MarkFlagFilename("out", "tar.gz") // the flag was just defined
	return c
}

func (a *app) debug(cmd *cobra.Command, out, socket string) error {
	host, _ := os.Hostname() // a bundle without one is good enough
	now := time.Now().UTC()
	name := "meshd-debug-" + host + "-" + now.Format("20060102T150405Z")
	b := &bundle{dir: name, now: now}
	var buffer bytes.Buffer
	zip := gzip.NewWriter(&buffer)
	b.tar = tar.NewWriter(zip)

	_, err := os.Stat(socket)
	hasAgent := err == nil
	api, apiErr := a.client()
	if !hasAgent && apiErr != nil {
		return fail(exitUnreachable, "there is nothing to ask: no agent at %s, and %v", socket, apiErr)
	}
	b.json("meshctl.json", map[string]any{"version": version, "time": now, "host": host, "uid": os.Getuid()})
	if hasAgent {
		debugHost(cmd.Context(), b, socket)
	} else {
		b.skip("host", err)
	}
	if apiErr == nil {
		debugServer(cmd.Context(), b, api)
	} else {
		b.skip("server", apiErr)
	}
	debugSystem(cmd.Context(), b)
	b.add("skipped.txt", []byte(strings.Join(b.skipped, "")), nil)
	if err := errors.Join(b.err, b.tar.Close(), zip.Close()); err != nil {
		return fmt.Errorf("make the bundle: %w", err)
	}
	if out == "-" {
		_, err := a.out.Write(buffer.Bytes())
		return err
	}
	if out == "" {
		out = name + ".tar.gz"
	}
	if err := renameio.WriteFile(out, buffer.Bytes(), 0o600); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(a.err, "%d files, %d KiB; %d could not be had, see skipped.txt in it\n", b.count, (buffer.Len()+1023)>>10, len(b.skipped)); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.out, out)
	return err
}

// bundle is a support bundle that is being filled.
type bundle struct {
	tar     *tar.Writer
	dir     string
	now     time.Time
	count   int
	skipped []string
	err     error // the first one of writing
}

// secrets are what tokens, keys and credentials look like. No part of a bundle
// should hold one; where a log or a message does, it is not passed on.
var secrets = regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)` +
	`|mesh(?:t_|key1\.|1\.)[A-Za-z0-9_-]{40,}|(?i:bearer|basic) [A-Za-z0-9+/=_.~-]{8,}`)

// add adds a file, or says why there is none.
func (b *bundle) add(name string, data []byte, err error) {
	if err != nil {
		b.skip(name, err)
		return
	}
	if !strings.HasSuffix(name, ".gz") {
		data = secrets.ReplaceAll(data, []byte("[a secret was here]"))
	}
	if b.err == nil {
		b.err = b.tar.WriteHeader(&tar.Header{Name: b.dir + "/" + name, Mode: 0o600, Size: int64(len(data)), ModTime: b.now})
	}
	if b.err == nil {
		_, b.err = b.tar.Write(data)
	}
	b.count++
}

func (b *bundle) skip(name string, err error) {
	text, _, _ := strings.Cut(err.Error(), "\n")
	b.skipped = append(b.skipped, string(secrets.ReplaceAll([]byte(name+": "+text+"\n"), []byte("[a secret was here]"))))
}

func (b *bundle) json(name string, value any) {
	data, err := json.MarshalIndent(value, "", "  ")
	b.add(name, append(data, '\n'), err)
}

// debugHost asks the agent of this host.
func debugHost(ctx context.Context, b *bundle, socket string) {
	for _, part := range []struct{ name, path string }{
		{"host/status.json", "/v1/agent/status"},
		{"host/config.json", "/v1/agent/debug/config"},
		{"host/plan.json", "/v1/agent/debug/plan"},
		{"host/view.json", "/v1/agent/debug/view"},
		{"host/metrics.txt", "/v1/agent/debug/metrics"},
		{"host/goroutines.txt", "/v1/agent/debug/goroutines"},
		{"host/heap.pb.gz", "/v1/agent/debug/heap"},
		{"host/proxy-goroutines.txt", "/v1/agent/debug/proxy-goroutines"},
		{"host/denials.json", "/v1/denials"},
	} {
		data, err := localRaw(ctx, socket, "GET", part.path)
		b.add(part.name, data, err)
	}
	found, err := localReport(ctx, socket)
	b.add("host/check.txt", []byte(found.String()), err)
	if st, err := localStatus(ctx, socket); err == nil {
		for _, p := range st.Proxies {
			debugProcess(b, fmt.Sprintf("host/proxy-%d", p.PID), p.PID)
		}
	}
}

// debugServer asks the server.
func debugServer(ctx context.Context, b *bundle, api *client.Client) {
	st, err := api.Status(ctx)
	if err != nil {
		b.skip("server", err)
		return
	}
	b.json("server/status.json", st)
	for _, kind := range client.Kinds() {
		list, err := api.List(ctx, kind, client.Selection{})
		if err != nil {
			b.skip("server/"+kind.Collection()+".json", err)
			continue
		}
		b.json("server/"+kind.Collection()+".json", list)
	}
	history, err := api.History(ctx, client.HistorySelection{Limit: 1000})
	if err != nil {
		b.skip("server/history.json", err)
	} else {
		b.json("server/history.json", history)
	}
	roots, err := api.Roots(ctx)
	if err != nil {
		b.skip("server/roots.pem", err)
	} else {
		var pem []byte
		for _, td := range roots.TrustDomains() {
			pem = append(pem, roots.PEM(td)...)
		}
		b.add("server/roots.pem", pem, nil)
	}
	data, err := api.Metrics(ctx)
	b.add("server/metrics.txt", data, err)
	for part, name := range map[string]string{"config": "config.json", "goroutines": "goroutines.txt", "heap": "heap.pb.gz"} {
		data, err := api.Debug(ctx, part)
		b.add("server/"+name, data, err)
	}
	found, err := serverReport(ctx, api)
	b.add("server/check.txt", []byte(found.String()), err)
}
