package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
)

func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "write manual pages, one for each command, into a folder", Args: exactly(1, "a folder"),
		Example: "  meshctl man /usr/local/share/man/man1",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil { //nolint:gosec // pages are for everybody
				return err
			}
			n, err := writeManuals(cmd.Root(), args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.err, "wrote %d pages to %s\n", n, args[0])
			return err
		},
	}
}

// writeManuals writes the page of a command and those of its subcommands.
func writeManuals(c *cobra.Command, dir string) (int, error) {
	path := filepath.Join(dir, manName(c)+".1")
	if err := renameio.WriteFile(path, []byte(manual(c)), 0o644); err != nil {
		return 0, err
	}
	n := 1
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() || sub.Name() == "help" {
			continue
		}
		more, err := writeManuals(sub, dir)
		if err != nil {
			return n, err
		}
		n += more
	}
	return n, nil
}

// manName is the name of a command's page: "meshctl-intention-allow".
func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// manual is the page of a command, in the macros of man(7).
func manual(c *cobra.Command) string {
	c.InitDefaultHelpFlag()
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %q 1 \"\" \"meshctl %s\" \"meshd\"\n", strings.ToUpper(manName(c)), version)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(manName(c)), roff(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n", roff(c.UseLine()))
	if c.Long != "" {
		b.WriteString(".SH DESCRIPTION\n")
		for paragraph := range strings.SplitSeq(c.Long, "\n\n") {
			fmt.Fprintf(&b, ".PP\n%s\n", roff(paragraph))
		}
	}
	manFlags(&b, "OPTIONS", c.NonInheritedFlags().FlagUsages())
	manFlags(&b, "OPTIONS OF EVERY COMMAND", c.InheritedFlags().FlagUsages())
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(c.Example))
	}
	var related []string
	if c.HasParent() {
		related = append(related, manName(c.Parent()))
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			related = append(related, manName(sub))
		}
	}
	if len(related) > 0 {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s(1)\n", roff(strings.Join(related, "(1), ")))
	}
	return b.String()
}

// manFlags shows flags as --help does.
func manFlags(b *strings.Builder, title, usages string) {
	if usages != "" {
		fmt.Fprintf(b, ".SH %s\n.nf\n%s\n.fi\n", title, roff(strings.TrimRight(usages, "\n")))
	}
}

// roff escapes text: a backslash, a hyphen that has to stay one, and what would be
// a request at the beginning of a line.
func roff(s string) string {
	lines := strings.Split(strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}
