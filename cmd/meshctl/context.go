package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server/client"
)

// contexts is the file with the meshes that a user works with.
type contexts struct {
	// Current is used when no other one is asked for.
	Current  string                 `json:"current,omitempty"`
	Contexts map[string]meshContext `json:"contexts,omitempty"`
}

// meshContext is how one mesh is reached.
type meshContext struct {
	Address     string `json:"address"`
	TrustDomain string `json:"trust_domain,omitempty"`
	// Token and Roots are the secret and the PEM themselves, so that the file
	// depends on no other.
	Token     string `json:"token,omitempty"`
	Roots     string `json:"roots,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

const configMode = 0o600

// address of no context is "".
func (c *meshContext) address() string {
	if c == nil {
		return ""
	}
	return c.Address
}

// configFile is where the contexts are; "" if there is no home.
func (a *app) configFile() string {
	if dir := a.env("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "meshctl", "config.hcl")
	}
	if home := a.env("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".config", "meshctl", "config.hcl")
	}
	return ""
}

// readContexts returns no contexts when there is no file.
func (a *app) readContexts() (contexts, error) {
	var c contexts
	path := a.configFile()
	if path == "" {
		return c, nil
	}
	file, err := os.Open(path) //nolint:gosec // the user's own
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, usage("%v", err)
	}
	defer file.Close() //nolint:errcheck // only read
	info, err := file.Stat()
	if err != nil {
		return c, usage("%v", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return c, usage("%s has tokens and others may read it: chmod 600 %s", path, path)
	}
	data, err := io.ReadAll(io.LimitReader(file, manifest.MaxSize+1))
	if err != nil {
		return c, usage("%v", err)
	}
	if err := manifest.DecodeConfig(path, data, &c); err != nil {
		return c, usage("%v", err)
	}
	return c, nil
}

func (a *app) writeContexts(c contexts) error {
	path := a.configFile()
	if path == "" {
		return usage("where is your configuration? set HOME")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(path, []byte(c.hcl()), configMode, renameio.IgnoreUmask())
}

// hcl is what readContexts reads.
func (c contexts) hcl() string {
	var b strings.Builder
	b.WriteString("# Written by meshctl login and meshctl context.\n")
	if c.Current != "" {
		fmt.Fprintf(&b, "current = %s\n", quoteHCL(c.Current))
	}
	b.WriteString("contexts = {\n")
	for _, name := range slices.Sorted(maps.Keys(c.Contexts)) {
		one := c.Contexts[name]
		fmt.Fprintf(&b, "  %s = {\n", quoteHCL(name))
		for _, f := range [][2]string{
			{"address", one.Address}, {"trust_domain", one.TrustDomain}, {"namespace", one.Namespace}, {"token", one.Token}, {"roots", one.Roots},
		} {
			if f[1] != "" {
				fmt.Fprintf(&b, "    %s = %s\n", f[0], quoteHCL(f[1]))
			}
		}
		b.WriteString("  }\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// quoteHCL quotes printable text and line breaks, which is all that contexts
// hold, and keeps HCL from reading a template in it.
func quoteHCL(s string) string {
	return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(strconv.Quote(s))
}

// context returns the context that a command is about: the one that is asked for,
// or the current one unless the environment names a server. It is nil if there is
// none, or another way to the server comes first.
func (a *app) context() (*meshContext, error) {
	if a.chosen != nil {
		return a.chosen, nil
	}
	name := a.contextName
	if name == "" && (a.addr != "" || a.env("MESH_ADDR") != "") {
		return nil, nil //nolint:nilnil // none
	}
	all, err := a.readContexts()
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = a.env("MESH_CONTEXT")
	}
	if name == "" {
		name = all.Current
	}
	if name == "" {
		return nil, nil //nolint:nilnil // none
	}
	one, ok := all.Contexts[name]
	if !ok {
		return nil, all.unknown(name)
	}
	a.chosen = &one
	return a.chosen, nil
}

func (c contexts) unknown(name string) error {
	names := slices.Sorted(maps.Keys(c.Contexts))
	if near := catalog.Closest(name, names); near != "" {
		return usage("there is no context %q; did you mean %s?", name, near)
	}
	return usage("there is no context %q; make it: meshctl login ADDRESS --name %s", name, name)
}

func (a *app) loginCommand() *cobra.Command {
	var name, fingerprint string
	c := &cobra.Command{
		Use: "login ADDRESS", Short: "keep how a mesh is reached as a context, and make it the current one", Args: exactly(1, "the address of a server, or of several with commas between them"),
		Long: `login keeps the address of a mesh, its roots and a token in
~/.config/meshctl/config.hcl, which only you can read.

The server is known by its roots, from --ca-cert or MESH_CACERT, or by their
fingerprint, which "meshd server fingerprint" prints on it: then the server is asked
for the roots. One of both it has to be: no server is trusted unseen. The token comes from --token-file,
MESH_TOKEN, MESH_TOKEN_FILE or standard input; on a terminal you are asked for it.`,
		Example: "  meshctl login 10.0.0.11 --name prod --fingerprint sha256:1f0c…\n  meshctl login 10.0.0.11,10.0.0.12,10.0.0.13 --ca-cert roots.pem < mesh.token",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.login(cmd, args[0], name, fingerprint)
		},
	}
	c.Flags().StringVar(&name, "name", "", "the context's name (default: the first label of the trust domain)")
	c.Flags().StringVar(&fingerprint, "fingerprint", "", `SHA-256 of the server's roots, as "meshd server fingerprint" prints it`)
	return c
}

// loginRoots returns the roots that the server must have, as PEM.
func (a *app) loginRoots(cmd *cobra.Command, address, fingerprint string) (string, error) {
	if fingerprint == "" {
		pem, err := a.rootsPEM()
		if err == nil && pem == "" {
			err = usage("how is the server known? give the fingerprint that \"meshd server fingerprint\" prints on it with --fingerprint, or its roots with --ca-cert or MESH_CACERT")
		}
		return pem, err
	}
	if a.caCert != "" {
		return "", usage("--fingerprint and --ca-cert exclude each other")
	}
	pin, err := client.ParseFingerprint(fingerprint)
	if err != nil {
		return "", usage("--fingerprint: %v", err)
	}
	roots, err := client.PinnedRoots(cmd.Context(), address, pin)
	if err != nil {
		return "", err
	}
	var pem strings.Builder
	for _, domain := range roots.TrustDomains() {
		pem.Write(roots.PEM(domain))
	}
	return pem.String(), nil
}

func (a *app) login(cmd *cobra.Command, address, name, fingerprint string) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	one := meshContext{Address: address, Namespace: a.first(a.namespace, "MESH_NAMESPACE", "")}
	cfg := client.Config{Address: address}
	if !strings.HasPrefix(address, "unix://") {
		if one.Roots, err = a.loginRoots(cmd, address, fingerprint); err != nil {
			return err
		}
		if cfg.Roots, err = parseRoots(one.Roots); err != nil {
			return err
		}
		if cfg.Token, err = a.loginToken(cmd.Context()); err != nil {
			return err
		}
		one.Token = string(cfg.Token.Reveal())
	}
	api, err := client.New(cfg)
	if err != nil {
		return usage("%v", err)
	}
	st, err := api.Whoami(cmd.Context())
	if err != nil {
		return err
	}
	one.TrustDomain = st.TrustDomain
	if name == "" {
		name, _, _ = strings.Cut(st.TrustDomain, ".")
	}
	if err := catalog.CheckLabel(name); err != nil {
		return usage("--name: %v", err)
	}
	if old, ok := all.Contexts[name]; ok && old.TrustDomain != one.TrustDomain {
		return fail(exitConflict, "context %s is of mesh %s, this one is %s: give it another --name", name, old.TrustDomain, one.TrustDomain)
	}
	if all.Contexts == nil {
		all.Contexts = map[string]meshContext{}
	}
	all.Contexts[name], all.Current = one, name
	if err := a.writeContexts(all); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, "context %s: mesh %s at %s\n", name, one.TrustDomain, one.Address)
	return err
}

// loginToken is the token of flags and environment, or what comes on standard
// input. Who sits there is asked, and what he types is not shown.
func (a *app) loginToken(ctx context.Context) (ca.Secret, error) {
	token, err := a.token()
	if err != nil || !token.IsZero() {
		return token, err
	}
	in := a.in
	if f, ok := a.in.(*os.File); ok {
		shown, err := hideTyping(f)
		if err != nil {
			return token, err
		}
		if shown != nil {
			defer shown()
			if _, err := fmt.Fprint(a.err, "token: "); err != nil {
				return token, err
			}
			in = firstLine{f}
		}
	}
	data, err := readToken(ctx, in)
	if err != nil {
		return token, err
	}
	text := strings.TrimSpace(string(data))
	if text == "" || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return token, usage("standard input holds no token; use --token-file, MESH_TOKEN_FILE or MESH_TOKEN")
	}
	return ca.NewSecret([]byte(text)), nil
}

// readToken reads to the end, or until the user has enough of it.
func readToken(ctx context.Context, in io.Reader) ([]byte, error) {
	const longest = 4096
	type read struct {
		data []byte
		err  error
	}
	done := make(chan read, 1)
	go func() { // it ends with the process, if not before
		data, err := io.ReadAll(io.LimitReader(in, longest))
		done <- read{data, err}
	}()
	select {
	case r := <-done:
		return r.data, r.err
	case <-ctx.Done():
		return nil, fail(exitError, "interrupted")
	}
}

func (a *app) contextCommand() *cobra.Command {
	c := &cobra.Command{Use: "context", Short: "the meshes that you are logged in to", RunE: group, Args: cobra.ArbitraryArgs}
	c.AddCommand(
		&cobra.Command{
			Use: "list", Short: "list contexts; the current one has a star", Args: exactly(0, "no arguments"),
			RunE: func(*cobra.Command, []string) error { return a.listContexts() },
		},
		&cobra.Command{
			Use: "use NAME", Short: "make a context the current one", Args: exactly(1, "the name of a context"),
			RunE: func(_ *cobra.Command, args []string) error {
				return a.changeContexts(args[0], func(c *contexts) { c.Current = args[0] }, "context %s is the current one\n")
			},
		},
		&cobra.Command{
			Use: "delete NAME", Short: "forget a context and its token", Args: exactly(1, "the name of a context"),
			RunE: func(_ *cobra.Command, args []string) error {
				return a.changeContexts(args[0], func(c *contexts) {
					delete(c.Contexts, args[0])
					if c.Current == args[0] {
						c.Current = ""
					}
				}, "context %s is forgotten\n")
			},
		},
	)
	return c
}

func (a *app) changeContexts(name string, change func(*contexts), said string) error {
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	if _, ok := all.Contexts[name]; !ok {
		return all.unknown(name)
	}
	change(&all)
	if err := a.writeContexts(all); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.err, said, name)
	return err
}

// listContexts shows all but the secrets.
func (a *app) listContexts() error {
	if err := a.checkFormat(); err != nil {
		return err
	}
	all, err := a.readContexts()
	if err != nil {
		return err
	}
	type shown struct {
		Name        string `json:"name"`
		Current     bool   `json:"current"`
		Address     string `json:"address"`
		TrustDomain string `json:"trust_domain"`
		Namespace   string `json:"namespace,omitempty"`
	}
	list := []shown{}
	t := table{columns: []string{"NAME", "CURRENT", "ADDRESS", "MESH", "NAMESPACE"}}
	for _, name := range slices.Sorted(maps.Keys(all.Contexts)) {
		one, star := all.Contexts[name], ""
		if name == all.Current {
			star = "*"
		}
		list = append(list, shown{name, name == all.Current, one.Address, one.TrustDomain, one.Namespace})
		t.rows = append(t.rows, []string{name, dash(star), one.Address, dash(one.TrustDomain), dash(one.Namespace)})
		t.names = append(t.names, name)
	}
	return a.show(t, list)
}
