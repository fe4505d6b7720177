package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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

	addr, caCert, tokenFile, namespace, format, contextName string

	chosen *meshContext // what context has found
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "meshctl",
		Short: "operate a meshd service mesh",
		Long: `meshctl operates a meshd service mesh.

It finds the servers by --addr, MESH_ADDR, the context that "meshctl login" made,
or the admin socket of a server on this machine. Over the network it needs the
context's, or MESH_TOKEN or MESH_TOKEN_FILE, and MESH_CACERT, the roots that
"meshctl ca roots" prints on a server.

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
		return usage("%v%s; see %s --help", err, nearFlag(c, err.Error()), c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", "", "servers: HOST:7400[,HOST:7400]... or unix:///PATH (MESH_ADDR)")
	f.StringVar(&a.caCert, "ca-cert", "", "PEM file with the roots that the server must chain to (MESH_CACERT)")
	f.StringVar(&a.tokenFile, "token-file", "", "file with the API token (MESH_TOKEN_FILE)")
	f.StringVar(&a.contextName, "context", "", "the context to use, see meshctl login (MESH_CONTEXT)")
	f.StringVarP(&a.namespace, "namespace", "n", "", "namespace of names written without one (MESH_NAMESPACE)")
	f.StringVarP(&a.format, "output", "o", "table", "table, wide, json, yaml, csv or name")
	root.AddCommand(
		a.getCommand(), a.validateCommand(), a.diffCommand(), a.applyCommand(), a.deleteCommand(), a.intentionCommand(),
		a.explainCommand(), a.tapCommand(), a.denialsCommand(), a.topCommand(), a.checkCommand(), a.tokenCommand(), a.policyCommand(), a.roleCommand(), a.canCommand(), a.whoamiCommand(), a.caCommand(), a.snapshotCommand(),
		a.operatorCommand(), a.proxyCommand(), a.membersCommand(), a.drainCommand(), a.undrainCommand(), a.loginCommand(), a.contextCommand(), a.debugCommand(), a.manCommand(), a.versionCommand(),
	)
	for _, k := range []client.Kind{client.KindService, client.KindNode, client.KindInstance} {
		c := a.shortGet(k)
		if k == client.KindNode {
			c.AddCommand(a.leaveCommand(), a.releaseCommand())
		}
		root.AddCommand(c)
	}
	root.AddCommand(a.auditCommand())
	a.completions(root)
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
	near := c.SuggestionsFor(args[0])
	if begun := slices.DeleteFunc(slices.Clone(near), func(s string) bool { return !strings.HasPrefix(s, args[0]) }); len(begun) > 0 {
		near = begun // two letters make any short word another
	}
	if len(near) > 0 {
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

// flagName finds flags in the text of --help.
var flagName = regexp.MustCompile(`--([a-z-]+)`)

// nearFlag suggests a flag for an unknown one that err names.
func nearFlag(c *cobra.Command, err string) string {
	unknown, ok := strings.CutPrefix(err, "unknown flag: --")
	if !ok {
		return ""
	}
	var have []string
	for _, m := range flagName.FindAllStringSubmatch(c.LocalFlags().FlagUsages()+c.InheritedFlags().FlagUsages(), -1) {
		have = append(have, m[1])
	}
	if near := catalog.Closest(unknown, have); near != "" {
		return ", did you mean --" + near + "?"
	}
	return ""
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

// exclusive demands that at most one of the flags is given.
func exclusive(c *cobra.Command, flags ...string) {
	c.PreRunE = func(c *cobra.Command, _ []string) error {
		var given []string
		for _, name := range flags {
			if c.Flags().Changed(name) {
				given = append(given, "--"+name)
			}
		}
		if len(given) > 1 {
			return usage("%s exclude each other; see %s --help", strings.Join(given, " and "), c.CommandPath())
		}
		return nil
	}
}

// command is the path of a command without the program's name, for messages that
// begin with that.
func command(c *cobra.Command) string {
	return strings.TrimPrefix(c.CommandPath(), c.Root().Name()+" ")
}

// inNamespace is the namespace of names that are written without one; "" if
// nobody says.
func (a *app) inNamespace() string {
	kept := ""
	if one, err := a.context(); err == nil && one != nil { // the error is client's to tell
		kept = one.Namespace
	}
	return a.first(a.namespace, "MESH_NAMESPACE", kept)
}

// client returns the client of the server that flags, environment or context
// name, in this order, or of the one on this machine.
func (a *app) client() (*client.Client, error) {
	one, err := a.context()
	if err != nil {
		return nil, err
	}
	cfg := client.Config{Address: a.first(a.addr, "MESH_ADDR", one.address())}
	if cfg.Address == "" {
		for _, path := range a.serverSockets() {
			if _, err := os.Stat(path); err == nil {
				return client.New(client.Config{Address: "unix://" + path})
			}
		}
		return nil, fail(exitUnreachable, "no server: none runs on this machine (looked for %s), neither --addr nor MESH_ADDR is set, and there is no current context",
			strings.Join(a.serverSockets(), ", "))
	}
	if strings.HasPrefix(cfg.Address, "unix://") {
		return client.New(cfg)
	}
	if cfg.Token, err = a.token(); err != nil {
		return nil, err
	}
	text, err := a.rootsPEM()
	if err != nil {
		return nil, err
	}
	if cfg.Roots, err = parseRoots(text); err != nil {
		return nil, err
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, usage("%v", err)
	}
	return c, nil
}

// first is the flag's value, the environment's, or the context's; a context that a
// flag names comes before the environment, too.
func (a *app) first(flag, variable, kept string) string {
	switch {
	case flag != "":
		return flag
	case a.contextName != "" && kept != "":
		return kept
	default:
		return cmp.Or(a.env(variable), kept)
	}
}

// rootsPEM is the file that flag or environment name, or the context's roots.
func (a *app) rootsPEM() (string, error) {
	kept := ""
	if a.chosen != nil {
		kept = a.chosen.Roots
	}
	path := a.env("MESH_CACERT")
	if a.caCert != "" {
		path = a.caCert
	} else if path == "" || a.contextName != "" && kept != "" {
		return kept, nil
	}
	data, err := os.ReadFile(path) //nolint:gosec // the user names it
	if err != nil {
		return "", usage("MESH_CACERT: %v", err)
	}
	if _, err := ca.ParseRootsPEM(data); err != nil {
		return "", usage("MESH_CACERT %s: %v", path, err)
	}
	return string(data), nil
}

// parseRoots returns no roots of no text.
func parseRoots(text string) (ca.Bundle, error) {
	if text == "" {
		return ca.Bundle{}, nil
	}
	roots, err := ca.ParseRootsPEM([]byte(text))
	if err != nil {
		return roots, usage("roots: %v", err)
	}
	return roots, nil
}

// token is that of flag, environment or context; none if nobody gives one.
func (a *app) token() (ca.Secret, error) {
	kept := ""
	if a.chosen != nil {
		kept = a.chosen.Token
	}
	path := cmp.Or(a.tokenFile, a.env("MESH_TOKEN_FILE"))
	switch text := a.env("MESH_TOKEN"); {
	case a.tokenFile != "":
	case a.contextName != "" && kept != "":
		return ca.NewSecret([]byte(kept)), nil
	case text != "":
		return ca.NewSecret([]byte(text)), nil
	case path == "" && kept != "":
		return ca.NewSecret([]byte(kept)), nil
	case path == "":
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
	ns := a.inNamespace()
	if ns == "" || s == "" || s == "*" || strings.Contains(s, "/") {
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
