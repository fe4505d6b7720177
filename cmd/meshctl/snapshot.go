package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	c := &cobra.Command{Use: "snapshot", Short: "save, inspect and restore what the servers hold", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.snapshotSaveCommand(), a.snapshotInspectCommand(), a.snapshotRestoreCommand())
	return c
}

func (a *app) snapshotSaveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "save FILE|-", Short: "save everything to a file, or to standard output", Args: exactly(1, "the file to write, or -"),
		Long: `save writes the whole state to a file that only you can read. It is encrypted and
authenticated under the cluster key: without that it can be neither read nor
restored. Keep the two apart.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.client()
			if err != nil {
				return err
			}
			if args[0] == "-" {
				_, err := api.SaveSnapshot(cmd.Context(), a.out)
				return err
			}
			return a.saveSnapshot(cmd.Context(), api, args[0])
		},
	}
}

func (a *app) saveSnapshot(ctx context.Context, api *client.Client, path string) error {
	if info, err := os.Stat(filepath.Dir(path)); err != nil || !info.IsDir() {
		return usage("%s: there is no folder %s", path, filepath.Dir(path))
	}
	file, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600), renameio.WithExistingPermissions())
	if err != nil {
		return err
	}
	defer file.Cleanup() //nolint:errcheck // after a success it does nothing
	n, err := api.SaveSnapshot(ctx, file)
	if err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	report, err := backup.Inspect(file, ca.ClusterKey{})
	if err != nil {
		return fmt.Errorf("what arrived of the snapshot: %w", err)
	}
	if err := file.CloseAtomicallyReplace(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, "saved %d bytes to %s: revision %d of mesh %s\n", n, path, report.Header.Position.Revision, report.Header.TrustDomain)
	return err
}

func (a *app) snapshotInspectCommand() *cobra.Command {
	var keyFile string
	c := &cobra.Command{
		Use: "inspect FILE|-", Short: "say what a snapshot is of, and whether it is intact", Args: exactly(1, "the file to read, or -"),
		Long: `inspect reads a snapshot without a server. It tells whose it is and when it was
taken, and whether it is complete. With the cluster key it also proves that
nobody has changed it, and counts what it holds. A damaged file is exit code 2.`,
		Example: "  meshctl snapshot inspect --cluster-key /etc/meshd/cluster.key mesh.snapshot",
		RunE: func(_ *cobra.Command, args []string) error {
			return a.inspectSnapshot(args[0], keyFile)
		},
	}
	c.Flags().StringVar(&keyFile, "cluster-key", "", "file with the cluster key: verify every part, and count the records")
	_ = c.MarkFlagFilename("cluster-key") // the flag was just defined
	return c
}

// inspection is what inspect prints as data.
type inspection struct {
	client.Snapshot
	ClusterKey string         `json:"cluster_key"`
	Bytes      int64          `json:"bytes"`
	Verified   bool           `json:"verified"`
	Records    map[string]int `json:"records,omitempty"`
}

func (a *app) inspectSnapshot(path, keyFile string) error {
	var key ca.ClusterKey
	var err error
	if keyFile != "" {
		if key, err = ca.ReadClusterKey(keyFile); err != nil {
			return usage("--cluster-key: %v", err)
		}
	}
	in := a.in
	if path != "-" {
		file, err := os.Open(path) //nolint:gosec // the user names it
		if err != nil {
			return usage("%v", err)
		}
		defer file.Close() //nolint:errcheck // only read
		in = file
	}
	report, err := backup.Inspect(in, key)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if a.format != "table" && a.format != "wide" {
		out := inspection{Snapshot: snapshotOf(report.Header), ClusterKey: report.Header.ClusterKey, Bytes: report.Bytes, Verified: report.Verified}
		if report.Verified {
			out.Records = map[string]int{}
		}
		for _, c := range report.Records {
			out.Records[c.Kind] = c.Records
		}
		return a.show(recordTable(report.Records), out)
	}
	return a.tellSnapshot(path, report)
}

func snapshotOf(h backup.Header) client.Snapshot {
	return client.Snapshot{TrustDomain: h.TrustDomain, Server: h.Server, Version: h.Version, Created: h.Created, Position: catalog.Position(h.Position)}
}

func (a *app) tellSnapshot(path string, report backup.Report) error {
	h := report.Header
	intact := "complete; with --cluster-key FILE inspect also proves that nobody changed it"
	if report.Verified {
		intact = "complete and authentic: every part was decrypted with the cluster key"
	}
	if _, err := fmt.Fprintf(a.out, `file          %s, %d bytes
intact        %s
trust domain  %s
cluster key   %s
taken         %s by %s, version %s
position      revision %d of generation %s
`, path, report.Bytes, intact, h.TrustDomain, h.ClusterKey, h.Created.Local().Format("2006-01-02 15:04:05 MST"),
		dash(h.Server), dash(h.Version), h.Position.Revision, h.Position.Generation); err != nil {
		return err
	}
	if !report.Verified {
		return nil
	}
	if _, err := fmt.Fprintln(a.out); err != nil {
		return err
	}
	return a.writeTable(a.out, recordTable(report.Records))
}

func recordTable(records []backup.Count) table {
	t := table{columns: []string{"KIND", "RECORDS"}}
	for _, c := range records {
		t.rows = append(t.rows, []string{c.Kind, strconv.Itoa(c.Records)})
		t.names = append(t.names, c.Kind)
	}
	return t
}

func (a *app) snapshotRestoreCommand() *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "restore FILE", Short: "replace everything by what a file holds", Args: exactly(1, "the file to read"),
		Long: `restore replaces the whole state in one step: agents see all of the old one or
all of the new one, and follow it at once. Tokens and nodes that came after the
snapshot are gone. It asks for the trust domain as a confirmation, on standard
input.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.restoreSnapshot(cmd.Context(), args[0], yes) },
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

func (a *app) restoreSnapshot(ctx context.Context, path string, yes bool) error {
	file, err := os.Open(path) //nolint:gosec // the user names it
	if err != nil {
		return usage("%v", err)
	}
	defer file.Close() //nolint:errcheck // only read
	report, err := backup.Inspect(file, ca.ClusterKey{})
	if err != nil {
		return fmt.Errorf("%s: %w; nothing was changed", path, err)
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	api, err := a.client()
	if err != nil {
		return err
	}
	if !yes {
		if err := a.confirmRestore(ctx, api, path, report.Header); err != nil {
			return err
		}
	}
	done, err := api.RestoreSnapshot(ctx, io.Reader(file))
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(a.err, "restored the state of %s\nbefore: revision %d of generation %s\nnow:    revision %d of generation %s\n",
		done.Snapshot.Created.Local().Format("2006-01-02 15:04:05 MST"),
		done.Before.Revision, done.Before.Generation, done.Position.Revision, done.Position.Generation); err != nil {
		return err
	}
	t := table{columns: []string{"KIND", "ADDED", "CHANGED", "REMOVED"}}
	for _, c := range done.Changes {
		t.rows = append(t.rows, []string{c.Kind, strconv.Itoa(c.Added), strconv.Itoa(c.Changed), strconv.Itoa(c.Removed)})
		t.names = append(t.names, c.Kind)
	}
	if len(t.rows) == 0 && a.format == "table" {
		_, err := fmt.Fprintln(a.err, "nothing was different")
		return err
	}
	return a.show(t, done)
}

// confirmRestore lets somebody type which mesh it is that he replaces.
func (a *app) confirmRestore(ctx context.Context, api *client.Client, path string, h backup.Header) error {
	status, err := api.Status(ctx)
	if err != nil {
		return err
	}
	if status.TrustDomain != h.TrustDomain {
		return fail(exitConflict, "%s is of mesh %s, and this is %s; nothing was changed", path, h.TrustDomain, status.TrustDomain)
	}
	if _, err := fmt.Fprintf(a.err, `%s was taken %s, at revision %d.
It replaces everything that the servers of %s hold, which are at revision %d now.
Type the trust domain to go on: `,
		path, h.Created.Local().Format("2006-01-02 15:04:05 MST"), h.Position.Revision, status.TrustDomain, status.Position.Revision); err != nil {
		return err
	}
	line, err := bufio.NewReader(io.LimitReader(a.in, 1<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if typed := strings.TrimSpace(line); typed != status.TrustDomain {
		return usage("%q is not %s: nothing was changed; --yes does not ask", typed, status.TrustDomain)
	}
	return nil
}
