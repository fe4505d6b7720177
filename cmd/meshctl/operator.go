package main

import (
	"fmt"

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
	}, a.raftCommand())
	return c
}
