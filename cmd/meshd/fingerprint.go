package main

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
)

// fingerprintCommand prints by what others can recognize this server.
func fingerprintCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use: "fingerprint", Short: "print the SHA-256 of the mesh's roots, for meshctl login", Args: noArgs,
		Long: `fingerprint asks the server that runs on this machine, over its admin socket, for
the roots of its mesh, and prints their SHA-256. Who has it can recognize the
servers: meshctl login ADDRESS --fingerprint SHA256. It is no secret.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var config server.Config
			if err := readConfig(path, &config); err != nil {
				return err
			}
			s, err := server.New(config, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			api, err := client.New(client.Config{Address: "unix://" + s.AdminSocket()})
			if err != nil {
				return err
			}
			roots, err := api.Roots(cmd.Context())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), roots.Hash(config.TrustDomain))
			return err
		},
	}
	c.Flags().StringVar(&path, "config", serverFile, "configuration file (.hcl, .yaml or .json)")
	_ = c.MarkFlagFilename("config", "hcl", "yaml", "json") // the flag was just defined
	return c
}
