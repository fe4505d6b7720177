package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/meshd/meshd/ca"
)

func (a *app) operatorCommand() *cobra.Command {
	c := &cobra.Command{Use: "operator", Short: "run the servers themselves", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(&cobra.Command{
		Use: "keygen FILE", Short: "make a cluster key; every server gets the same one", Args: exactly(1, "the file to write"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := ca.WriteClusterKey(args[0], ca.GenerateClusterKey()); err != nil {
				return err
			}
			_, err := fmt.Fprintf(a.err, "wrote %s: copy it to every server (mode 0600), and keep a copy where backups do not go\n", args[0])
			return err
		},
	})
	return c
}

func (a *app) snapshotCommand() *cobra.Command {
	c := &cobra.Command{Use: "snapshot", Short: "save and restore what the servers hold", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(
		&cobra.Command{
			Use: "save FILE", Short: "save everything to a file", Args: exactly(1, "the file to write"),
			Long: "save writes the whole state, checksummed, to a file that only you can read.\nThe CA's keys in it are wrapped under the cluster key; tokens are hashes.",
			RunE: func(cmd *cobra.Command, args []string) error { return a.saveSnapshot(cmd.Context(), args[0]) },
		},
		&cobra.Command{
			Use: "restore FILE", Short: "replace everything by what a file holds", Args: exactly(1, "the file to read"),
			Long: "restore replaces the whole state in one step: agents see all of the old one or\nall of the new one, and follow it at once. Tokens and nodes that came after the\nsnapshot are gone.",
			RunE: func(cmd *cobra.Command, args []string) error { return a.restoreSnapshot(cmd.Context(), args[0]) },
		},
	)
	return c
}

func (a *app) saveSnapshot(ctx context.Context, path string) error {
	api, err := a.client()
	if err != nil {
		return err
	}
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
	if err := file.CloseAtomicallyReplace(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, "saved %d bytes to %s\n", n, path)
	return err
}

func (a *app) restoreSnapshot(ctx context.Context, path string) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	file, err := os.Open(path) //nolint:gosec // the user names it
	if err != nil {
		return usage("%v", err)
	}
	defer file.Close() //nolint:errcheck // only read
	result, err := api.RestoreSnapshot(ctx, io.Reader(file))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, "restored; the state is at revision %d of generation %s\n", result.Position.Revision, result.Position.Generation)
	return err
}
