package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server/client"
)

func (a *app) validateCommand() *cobra.Command {
	var paths []string
	var services bool
	c := &cobra.Command{
		Use: "validate -f PATH", Short: "check manifests, or service definitions, without a server", Args: exactly(0, "no arguments but -f"),
		Example: "  meshctl validate -f mesh.hcl\n  meshctl validate --services -f /etc/meshd/services.d",
		RunE: func(*cobra.Command, []string) error {
			what, check := "resources", func(name string, data []byte) (int, error) {
				resources, err := manifest.Load(name, data)
				return len(resources), err
			}
			if services {
				what, check = "service definitions", func(name string, data []byte) (int, error) {
					definitions, err := manifest.Definitions(name, data)
					return len(definitions), err
				}
			}
			n, err := a.eachFile(paths, check)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "%d %s are valid\n", n, what)
			return err
		},
	}
	fileFlag(c, &paths)
	c.Flags().BoolVar(&services, "services", false, "the files are service definitions, as in an agent's services.d")
	return c
}

func fileFlag(c *cobra.Command, paths *[]string) {
	c.Flags().StringArrayVarP(paths, "filename", "f", nil, "manifest file or folder (.hcl, .yaml, .json); - reads YAML from standard input")
	_ = c.MarkFlagFilename("filename", "hcl", "yaml", "yml", "json") // the flag was just defined
}

func (a *app) applyCommand() *cobra.Command {
	var paths []string
	var dry bool
	var set setFlags
	var w waiter
	c := &cobra.Command{
		Use: "apply -f PATH", Short: "write the resources of manifests, all or none", Args: exactly(0, "no arguments but -f"),
		Example: "  meshctl apply -f mesh.hcl\n  meshctl apply -f intentions/ --dry-run\n  meshctl apply -f shop/ --set shop --prune",
		RunE: func(cmd *cobra.Command, _ []string) error {
			docs, err := a.load(paths)
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			req := applyRequest(docs)
			req.DryRun, req.Set, req.Prune = dry, set.name, set.prune
			services, err := concerned(cmd.Context(), api, docs, req, w.on)
			if err != nil {
				return err
			}
			before := w.before(cmd.Context(), api, services)
			result, err := api.Apply(cmd.Context(), req)
			if err != nil {
				return err
			}
			if err := a.showResult(result); err != nil {
				return err
			}
			if dry {
				return nil
			}
			return w.wait(cmd.Context(), a, api, result.Position, before)
		},
	}
	fileFlag(c, &paths)
	c.Flags().BoolVar(&dry, "dry-run", false, "show what would change, write nothing")
	set.flags(c)
	w.flags(c)
	return c
}

// concerned are the services whose proxies a wait is for: those of the documents,
// and of what leaves a set.
func concerned(ctx context.Context, api *client.Client, docs []manifest.Document, req client.ApplyRequest, wait bool) ([]catalog.Name, error) {
	names := docNames(docs)
	if !wait || !req.Prune || req.DryRun {
		return names, nil
	}
	req.DryRun = true
	would, err := api.Apply(ctx, req)
	if err != nil {
		return nil, err
	}
	for _, n := range changedServices(would.Changes) {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names, nil
}

// docNames are the services whose proxies the documents concern.
func docNames(docs []manifest.Document) []catalog.Name {
	var names []catalog.Name
	for i := range docs {
		r, err := docs[i].Decode()
		if err != nil {
			continue // load has decoded it before
		}
		for _, n := range servicesOf(r.Value) {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

// load reads and checks all documents of files and folders.
func (a *app) load(paths []string) ([]manifest.Document, error) {
	var docs []manifest.Document
	_, err := a.eachFile(paths, func(name string, data []byte) (int, error) {
		if _, err := manifest.Load(name, data); err != nil {
			return 0, err
		}
		more, err := manifest.Parse(name, data)
		docs = append(docs, more...)
		return len(more), err
	})
	return docs, err
}

// eachFile gives every file to check, and returns how many things were found.
// It reports every problem of every file, not just the first.
func (a *app) eachFile(paths []string, check func(name string, data []byte) (int, error)) (int, error) {
	if len(paths) == 0 {
		return 0, usage("which file? use -f FILE, -f FOLDER or -f -")
	}
	files, err := expand(paths)
	if err != nil {
		return 0, usage("%v", err)
	}
	total := 0
	var problems []error
	for _, file := range files {
		name, data, err := a.read(file)
		if err != nil {
			return 0, usage("%v", err)
		}
		n, err := check(name, data)
		total += n
		if err != nil {
			problems = append(problems, err)
		}
	}
	if err := errors.Join(problems...); err != nil {
		return 0, err
	}
	if total == 0 {
		return 0, usage("nothing in %s", strings.Join(paths, ", "))
	}
	return total, nil
}

func (a *app) read(file string) (name string, data []byte, err error) {
	if file == "-" {
		data, err = io.ReadAll(io.LimitReader(a.in, manifest.MaxSize+1))
		return "stdin.yaml", data, err
	}
	data, err = os.ReadFile(file) //nolint:gosec // the user names it
	return file, data, err
}

// expand replaces folders by the manifests in them, in order of their names.
func expand(paths []string) ([]string, error) {
	var files []string
	for _, p := range paths {
		if info, err := os.Stat(p); p == "-" || err == nil && !info.IsDir() {
			files = append(files, p)
			continue
		} else if err != nil {
			return nil, err
		}
		err := filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && slices.Contains([]string{".hcl", ".yaml", ".yml", ".json"}, filepath.Ext(path)) {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

// setFlags name the set that resources belong to.
type setFlags struct {
	name  string
	prune bool
}

func (s *setFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&s.name, "set", "", "record that the resources belong to the set; a set has any size")
	c.Flags().BoolVar(&s.prune, "prune", false, "delete what belongs to the set and is no longer in the files")
}

func (a *app) deleteCommand() *cobra.Command {
	var prune bool
	c := &cobra.Command{
		Use: "delete KIND NAME", Short: "delete one resource", Args: cobra.MinimumNArgs(2),
		Example: "  meshctl delete node vm-017\n  meshctl delete intention web api\n  meshctl delete set shop --prune",
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := kindOf(args[0])
			if err != nil {
				return err
			}
			if kind == client.KindSet && len(args) == 2 {
				return a.removeSet(cmd, args[1], prune)
			}
			if prune {
				return usage("--prune is for sets")
			}
			return a.remove(cmd, kind, args[1:], &waiter{})
		},
	}
	c.Flags().BoolVar(&prune, "prune", false, "of a set: delete all that belongs to it, too")
	return c
}

// removeSet forgets a set.
func (a *app) removeSet(cmd *cobra.Command, name string, prune bool) error {
	api, err := a.client()
	if err != nil {
		return err
	}
	result, err := api.DeleteSet(cmd.Context(), name, prune)
	if err != nil {
		return err
	}
	return a.showResult(result)
}

func (a *app) remove(cmd *cobra.Command, kind client.Kind, names []string, w *waiter) error {
	ref, prefix, err := a.ref(kind, names)
	if err != nil {
		return err
	}
	if prefix {
		return usage("instances are registered by agents: remove the definition from services.d of their node")
	}
	api, err := a.client()
	if err != nil {
		return err
	}
	var concerned []catalog.Name
	if kind == client.KindIntention {
		key, err := a.intentionKey(names[0], names[1])
		if err != nil {
			return err
		}
		concerned = keyServices(key)
	}
	before := w.before(cmd.Context(), api, concerned)
	result, err := api.Delete(cmd.Context(), ref, client.AnyRevision)
	if err != nil {
		return err
	}
	if err := a.showResult(result); err != nil {
		return err
	}
	return w.wait(cmd.Context(), a, api, result.Position, before)
}

// showResult prints what a write did: data on standard output, warnings beside
// it.
func (a *app) showResult(r client.Result) error {
	for _, w := range r.Warnings {
		if _, err := fmt.Fprintln(a.err, "warning: "+w); err != nil {
			return err
		}
	}
	t := table{}
	for _, c := range r.Changes {
		t.names = append(t.names, string(c.Kind)+"/"+c.Name)
	}
	if a.format != "table" && a.format != "wide" {
		t.columns = []string{"KIND", "NAME", "CHANGE"}
		for _, c := range r.Changes {
			t.rows = append(t.rows, []string{string(c.Kind), c.Name, c.Change})
		}
		return a.show(t, r)
	}
	for _, c := range r.Changes {
		note := ""
		if r.DryRun {
			note = " (dry run)"
		}
		if _, err := fmt.Fprintf(a.out, "%s %s: %s%s\n", c.Kind, c.Name, c.Change, note); err != nil {
			return err
		}
	}
	return nil
}

const defaultWait = 30 * time.Second
