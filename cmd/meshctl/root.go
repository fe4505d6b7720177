package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

// app is what every command shares.
type app struct {
	in       io.Reader
	out, err io.Writer
	env      func(string) string

	addr, caCert, tokenFile, namespace, format string
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "meshctl",
		Short: "operate a meshd service mesh",
		Long: `meshctl operates a meshd service mesh.

It finds the servers by --addr, MESH_ADDR, or the admin socket of a server on
this machine. Over the network it needs MESH_TOKEN or MESH_TOKEN_FILE, and
MESH_CACERT, the roots that "meshctl ca roots" prints on a server.

Exit codes: 0 ok, allowed · 1 error · 2 usage, invalid file · 3 denied, check
failed · 4 not found · 5 permission · 6 unreachable, no leader · 7 conflict ·
8 outcome unknown (repeating is safe).`,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          group,
		Args:          cobra.ArbitraryArgs,
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage("%v; see %s --help", err, c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", "", "server: HOST:7400 or unix:///PATH (MESH_ADDR)")
	f.StringVar(&a.caCert, "ca-cert", "", "PEM file with the roots that the server must chain to (MESH_CACERT)")
	f.StringVar(&a.tokenFile, "token-file", "", "file with the API token (MESH_TOKEN_FILE)")
	f.StringVarP(&a.namespace, "namespace", "n", "", "namespace of names written without one (MESH_NAMESPACE)")
	f.StringVarP(&a.format, "output", "o", "table", "table, wide, json, yaml, csv or name")
	root.AddCommand(
		a.getCommand(), a.validateCommand(), a.diffCommand(), a.applyCommand(), a.deleteCommand(), a.intentionCommand(),
		a.explainCommand(), a.checkCommand(), a.tokenCommand(), a.caCommand(), a.snapshotCommand(),
		a.operatorCommand(), a.proxyCommand(), a.membersCommand(), a.versionCommand(),
	)
	for _, k := range []client.Kind{client.KindService, client.KindNode, client.KindInstance} {
		root.AddCommand(a.shortGet(k))
	}
	root.InitDefaultCompletionCmd()
	return root
}

// group runs a command that only has subcommands.
func group(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	c.SuggestionsMinimumDistance = 2
	text := fmt.Sprintf("%q is no command of %s", args[0], c.CommandPath())
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		text += "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return usage("%s See %s --help", strings.TrimSuffix(text, "?")+mark(text), c.CommandPath())
}

func mark(text string) string {
	if strings.HasSuffix(text, "?") {
		return "?"
	}
	return "."
}

// exactly demands n arguments and names them when they are not there.
func exactly(n int, names string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usage("%s takes %s, got %d; see %s --help", command(c), names, len(args), c.CommandPath())
		}
		return nil
	}
}

// command is the path of a command without the program's name, for messages that
// begin with that.
func command(c *cobra.Command) string {
	return strings.TrimPrefix(c.CommandPath(), c.Root().Name()+" ")
}

// setting returns the flag's value, or the environment's.
func (a *app) setting(flag, variable string) string {
	if flag != "" {
		return flag
	}
	return a.env(variable)
}

// client returns the client of the server that flags and environment name, or
// of the one on this machine.
func (a *app) client() (*client.Client, error) {
	cfg := client.Config{Address: a.setting(a.addr, "MESH_ADDR")}
	if cfg.Address == "" {
		for _, path := range a.serverSockets() {
			if _, err := os.Stat(path); err == nil {
				return client.New(client.Config{Address: "unix://" + path})
			}
		}
		return nil, fail(exitUnreachable, "no server: none runs on this machine (looked for %s), and neither --addr nor MESH_ADDR is set",
			strings.Join(a.serverSockets(), ", "))
	}
	if strings.HasPrefix(cfg.Address, "unix://") {
		return client.New(cfg)
	}
	token, err := a.token()
	if err != nil {
		return nil, err
	}
	cfg.Token = token
	if path := a.setting(a.caCert, "MESH_CACERT"); path != "" {
		data, err := os.ReadFile(path) //nolint:gosec // the user names it
		if err != nil {
			return nil, usage("MESH_CACERT: %v", err)
		}
		if cfg.Roots, err = ca.ParseRootsPEM(data); err != nil {
			return nil, usage("MESH_CACERT %s: %v", path, err)
		}
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, usage("%v", err)
	}
	return c, nil
}

func (a *app) token() (ca.Secret, error) {
	if a.tokenFile == "" {
		if t := a.env("MESH_TOKEN"); t != "" {
			return ca.NewSecret([]byte(t)), nil
		}
	}
	path := a.setting(a.tokenFile, "MESH_TOKEN_FILE")
	if path == "" {
		return ca.Secret{}, nil
	}
	data, err := os.ReadFile(path) //nolint:gosec // the user names it
	if err != nil {
		return ca.Secret{}, usage("token file: %v", err)
	}
	return ca.NewSecret([]byte(strings.TrimSpace(string(data)))), nil
}

// serverSockets are where a server, or meshd dev, on this machine listens for
// its own user and root.
func (a *app) serverSockets() []string {
	paths := []string{"/var/lib/meshd/server/admin.sock", "/run/meshd/server.sock"}
	if dir := a.env("XDG_RUNTIME_DIR"); dir != "" {
		paths = append(paths, filepath.Join(dir, "meshd", "server.sock"))
	}
	return append(paths, filepath.Join(os.TempDir(), "meshd-"+strconv.Itoa(os.Getuid()), "server.sock"))
}

// name reads the name of a service in the namespace that is asked for.
func (a *app) name(s string) (catalog.Name, error) {
	n, err := catalog.ParseName(a.qualify(s))
	if err != nil {
		return n, usage("%v", err)
	}
	return n, nil
}

// qualify puts a bare name into the namespace that is asked for.
func (a *app) qualify(s string) string {
	ns := a.setting(a.namespace, "MESH_NAMESPACE")
	if ns == "" || s == "*" || strings.Contains(s, "/") {
		return s
	}
	return ns + "/" + s
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version", Args: exactly(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(a.out, "meshctl", version)
			return err
		},
	}
}

func (a *app) caCommand() *cobra.Command {
	c := &cobra.Command{Use: "ca", Short: "the certificate authority", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(&cobra.Command{
		Use: "roots", Short: "print the roots as PEM, for MESH_CACERT", Args: exactly(0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := a.client()
			if err != nil {
				return err
			}
			bundle, err := api.Roots(cmd.Context())
			if err != nil {
				return err
			}
			for _, td := range bundle.TrustDomains() {
				if _, err := a.out.Write(bundle.PEM(td)); err != nil {
					return err
				}
			}
			return nil
		},
	})
	return c
}

var errFormat = errors.New("unknown output format")
