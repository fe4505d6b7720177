package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server"
)

// recoverCommand makes a cluster of one out of what is left of a larger one.
func recoverCommand() *cobra.Command {
	var path string
	var yes, look bool
	c := &cobra.Command{
		Use: "recover", Short: "make this stopped server the only one, when most are lost for ever", Args: noArgs,
		Long: `recover is for the day on which most servers of a cluster are lost for ever, so
that those that are left elect no leader. It makes this server, which must be
stopped, the only member. Run it with --look on each server that is left, and
recover the one with the greatest term and, among equals, the greatest entry.

What was acknowledged and has not reached this server is lost. The other servers
must not run with their old state again: stop them, move the folder "store" in
their data_dir away, and start them; they join as new members.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var config server.Config
			if err := readConfig(path, &config); err != nil {
				return err
			}
			found, err := server.Inspect(cmd.Context(), config)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if err := describe(out, found); err != nil || look {
				return err
			}
			if !yes {
				if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), found.Name); err != nil {
					return err
				}
			}
			if err := found.Recover(); err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "%s is the only server now, at %s. Start it. On every other server that is left: stop it, move the folder "+
				"store in its data_dir away, start it.\n", found.Name, found.Address)
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&path, "config", serverFile, "configuration file (.hcl, .yaml or .json)")
	f.BoolVar(&look, "look", false, "tell what there is, and change nothing")
	f.BoolVar(&yes, "yes", false, "do not ask")
	_ = c.MarkFlagFilename("config", "hcl", "yaml", "json") // the flag was just defined
	return c
}

func describe(out io.Writer, r server.Recovery) error {
	var names []string
	for _, m := range r.Members {
		names = append(names, fmt.Sprintf("%s at %s", m.ID, m.Address))
	}
	_, err := fmt.Fprintf(out, "server   %s\nterm     %d\nentry    %d\nmembers  %s\n", r.Name, r.Term, r.Last, strings.Join(names, ", "))
	return err
}

// confirm demands that somebody types the server's name.
func confirm(in io.Reader, out io.Writer, name string) error {
	if _, err := fmt.Fprintf(out, "The other members lose their place, and what only they have is lost. Type %s to go on: ", name); err != nil {
		return err
	}
	typed, err := bufio.NewReader(in).ReadString('\n')
	if strings.TrimSpace(typed) == name {
		return nil
	}
	if err != nil && typed == "" {
		return usageError{errors.New("nothing was changed: nobody answered; say --yes where nobody can")}
	}
	return usageError{fmt.Errorf("nothing was changed: %q is not %s", strings.TrimSpace(typed), name)}
}
