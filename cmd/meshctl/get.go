package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
)

// lister is what the flags of get and its short forms say.
type lister struct {
	labels []string
	prefix string
	all    bool
	watch  bool
}

func (l *lister) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVarP(&l.labels, "selector", "l", nil, `only nodes with the label: "name=value", or "name"; may be repeated`)
	f.StringVar(&l.prefix, "prefix", "", "only names that begin so; for instances that of the service, for intentions of the destination")
	f.BoolVarP(&l.all, "all-namespaces", "A", false, "of every namespace, whatever MESH_NAMESPACE says")
	f.BoolVarP(&l.watch, "watch", "w", false, "show what there is and then every change, until interrupted")
}

// selection is what the servers are asked for.
func (l *lister) selection(a *app, kind client.Kind) client.Selection {
	sel := client.Selection{Prefix: l.prefix, Labels: l.labels}
	if slices.Contains([]client.Kind{client.KindService, client.KindInstance, client.KindIntention}, kind) && !l.all {
		sel.Namespace = a.inNamespace()
	}
	return sel
}

func (a *app) getCommand() *cobra.Command {
	var l lister
	c := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "show resources: namespaces, nodes, services, instances, intentions, sets, policies, roles, members",
		Example: `  meshctl get services
  meshctl get nodes -l rack=r1 --watch
  meshctl get node vm-017 -o yaml
  meshctl get intention web api`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("which kind? one of %s", strings.Join(append(collections(), "members"), ", "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "members" || args[0] == "member" {
				if len(args) > 1 {
					return usage("get members takes no name, got %q", args[1])
				}
				return a.members(cmd, l.watch)
			}
			kind, err := kindOf(args[0])
			if err != nil {
				return err
			}
			return a.get(cmd, kind, args[1:], l)
		},
	}
	l.flags(c)
	return c
}

// shortGet is "meshctl services" for "meshctl get services".
func (a *app) shortGet(kind client.Kind) *cobra.Command {
	var l lister
	c := &cobra.Command{
		Use: kind.Collection() + " [NAME]", Aliases: []string{string(kind)}, Short: "show " + kind.Collection(), Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.get(cmd, kind, args, l) },
	}
	l.flags(c)
	return c
}

func collections() []string {
	var out []string
	for _, k := range client.Kinds() {
		out = append(out, k.Collection())
	}
	return out
}

// kindOf reads a kind in singular or plural.
func kindOf(s string) (client.Kind, error) {
	for _, k := range client.Kinds() {
		if s == string(k) || s == k.Collection() {
			return k, nil
		}
	}
	if s == "token" || s == "tokens" {
		return "", usage("tokens are no resources; see meshctl token --help")
	}
	names := append(collections(), "members")
	near := names
	for _, k := range client.Kinds() {
		near = append(near, string(k))
	}
	text := fmt.Sprintf("%q is no kind.", s)
	if one := catalog.Closest(s, near); one != "" {
		text = fmt.Sprintf("%q is no kind; did you mean %s?", s, one)
	}
	text += " Kinds are " + strings.Join(names, ", ")
	return "", usage("%s", text)
}

func (a *app) get(cmd *cobra.Command, kind client.Kind, names []string, l lister) error {
	if err := a.checkFormat(); err != nil {
		return err
	}
	api, err := a.client()
	if err != nil {
		return err
	}
	sel, keep := l.selection(a, kind), func(client.Item) bool { return true }
	if len(names) > 0 {
		if len(l.labels) > 0 || l.prefix != "" {
			return usage("--selector and --prefix are for lists; %q names what to show", strings.Join(names, " "))
		}
		ref, group, err := a.ref(kind, names)
		if err != nil {
			return err
		}
		if !group && !l.watch {
			item, err := api.Get(cmd.Context(), ref)
			if err != nil {
				return err
			}
			return a.showItems(kind, []client.Item{item})
		}
		sel, keep = around(ref)
	}
	if l.watch {
		return a.watch(cmd, api, kind, sel, keep)
	}
	list, err := api.List(cmd.Context(), kind, sel)
	if err != nil {
		return err
	}
	items := slices.DeleteFunc(list.Items, func(i client.Item) bool { return !keep(i) })
	if len(names) > 0 && len(items) == 0 {
		return a.noneOf(cmd, api, kind, names)
	}
	return a.showItems(kind, items)
}

// noneOf says that a service has no instances, or that it does not exist.
func (a *app) noneOf(cmd *cobra.Command, api *client.Client, kind client.Kind, names []string) error {
	ref, _, err := a.ref(client.KindService, names)
	if kind == client.KindInstance && err == nil {
		if _, err := api.Get(cmd.Context(), ref); err != nil {
			return err
		}
	}
	return fail(exitNotFound, "%s has no %s", strings.Join(names, " "), kind.Collection())
}

// around is the smallest selection with everything whose parts begin as those
// of ref, and what tells these from the rest of it.
func around(ref client.Ref) (client.Selection, func(client.Item) bool) {
	sel := client.Selection{Prefix: ref.Parts[0]}
	if len(ref.Parts) > 1 {
		sel = client.Selection{Namespace: ref.Parts[0], Prefix: ref.Parts[1]}
	}
	return sel, func(i client.Item) bool {
		return len(i.Ref.Parts) >= len(ref.Parts) && slices.Equal(i.Ref.Parts[:len(ref.Parts)], ref.Parts)
	}
}

// ref reads the name of a resource as people write it. With prefix it names
// all resources whose parts begin so: the instances of a service.
func (a *app) ref(kind client.Kind, names []string) (ref client.Ref, prefix bool, err error) {
	if kind == client.KindIntention {
		if len(names) != 2 {
			return ref, false, usage("an intention is named by its source and its destination, as in: intention web api")
		}
		key, err := a.intentionKey(names[0], names[1])
		return client.IntentionRef(key), false, err
	}
	if len(names) != 1 {
		return ref, false, usage("one name, please: got %q", strings.Join(names, " "))
	}
	switch kind {
	case client.KindNamespace, client.KindNode, client.KindSet, client.KindPolicy, client.KindRole:
		return client.Ref{Kind: kind, Parts: names}, false, nil
	case client.KindService, client.KindInstance:
		n, err := a.name(names[0])
		return client.Ref{Kind: kind, Parts: []string{n.Namespace, n.Name}}, kind == client.KindInstance, err
	case client.KindIntention:
	}
	return ref, false, usage("%q is no kind", kind)
}

func (a *app) intentionKey(source, destination string) (intentions.Key, error) {
	key, err := intentions.ParseKey(a.qualifySource(source), a.qualify(destination))
	if err != nil {
		return key, usage("%v", err)
	}
	return key, nil
}

func (a *app) qualifySource(s string) string {
	if strings.HasPrefix(s, "spiffe://") {
		return s
	}
	return a.qualify(s)
}

func (a *app) showItems(kind client.Kind, items []client.Item) error {
	t := table{}
	row := rowers[kind]
	t.columns, t.wide = row.columns, row.wide
	for _, i := range items {
		r, err := row.row(a, i)
		if err != nil {
			return fmt.Errorf("%s %s: this version cannot read it: %w", kind, i.Name, err)
		}
		t.names = append(t.names, string(kind)+"/"+i.Name)
		t.rows = append(t.rows, r)
	}
	if a.format == "yaml" {
		return a.showManifests(items)
	}
	return a.show(t, items)
}

// showManifests prints what apply reads back; instances and sets, which apply
// does not take, in the same form.
func (a *app) showManifests(items []client.Item) error {
	for n, i := range items {
		if n > 0 {
			if _, err := fmt.Fprintln(a.out, "---"); err != nil {
				return err
			}
		}
		text, err := manifestYAML(i)
		if err != nil {
			return fmt.Errorf("%s %s: this version cannot read it: %w", i.Kind, i.Name, err)
		}
		if _, err := a.out.Write(text); err != nil {
			return err
		}
	}
	return nil
}

func manifestYAML(i client.Item) ([]byte, error) {
	var spec map[string]any
	if err := json.Unmarshal(i.Spec, &spec); err != nil {
		return nil, err
	}
	spec["kind"] = i.Kind
	if i.Kind == client.KindInstance || i.Kind == client.KindSet {
		return manifest.YAML(spec)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	resources, err := manifest.Load("stored.json", text)
	if err != nil {
		return nil, err
	}
	return manifest.EncodeYAML(resources...)
}

// A rower makes rows of one kind.
type rower struct {
	columns []string
	wide    int
	row     func(*app, client.Item) ([]string, error)
}

var rowers = map[client.Kind]rower{
	client.KindNamespace: {columns: []string{"NAME"}, row: func(_ *app, i client.Item) ([]string, error) { return []string{i.Name}, nil }},
	client.KindNode:      {columns: []string{"NAME", "STATE", "SINCE", "INSTANCES", "ADDRESS", "MAY RUN", "VERSION"}, wide: 6, row: nodeRow},
	client.KindService:   {columns: []string{"NAME", "PORTS", "HEALTHY", "INSTANCES", "STALE"}, row: serviceRow},
	client.KindInstance:  {columns: []string{"SERVICE", "NODE", "ID", "HEALTH", "ADDRESS", "WEIGHT", "ZONE", "PORTS", "EXTERNAL", "TAGS", "CHECKS"}, wide: 5, row: instanceRow},
	client.KindIntention: {columns: []string{"SOURCE", "DESTINATION", "DECISION", "EXPIRES", "REASON", "REVISION"}, wide: 5, row: intentionRow},
	client.KindSet:       {columns: []string{"NAME", "RESOURCES", "UPDATED", "BY", "MEMBERS"}, wide: 4, row: setRow},
	client.KindPolicy:    {columns: []string{"NAME", "RULES", "DESCRIPTION"}, row: policyRow},
	client.KindRole:      {columns: []string{"NAME", "POLICIES", "DESCRIPTION"}, row: roleRow},
}

func setRow(a *app, i client.Item) ([]string, error) {
	var spec struct {
		Updated time.Time `json:"updated"`
		By      string    `json:"by"`
	}
	var st client.SetStatus
	if err := decode(i, &spec, &st); err != nil {
		return nil, err
	}
	var members []string
	for _, m := range st.Members {
		members = append(members, string(m.Kind)+"/"+strings.Join(m.Parts, "/"))
	}
	return []string{i.Name, strconv.Itoa(len(members)), a.ago(spec.Updated), dash(spec.By), dash(strings.Join(members, ","))}, nil
}

func nodeRow(a *app, i client.Item) ([]string, error) {
	var spec catalog.Node
	var st client.NodeStatus
	if err := decode(i, &spec, &st); err != nil {
		return nil, err
	}
	if st.Drain {
		st.State += ", drained"
	}
	return []string{i.Name, st.State, a.age(st.Since), strconv.Itoa(st.Instances), dash(st.Address), dash(strings.Join(spec.Services, ",")), dash(st.Version)}, nil
}

func serviceRow(_ *app, i client.Item) ([]string, error) {
	var spec catalog.Service
	var st client.ServiceStatus
	if err := decode(i, &spec, &st); err != nil {
		return nil, err
	}
	var ports []string
	for _, p := range spec.WithDefaults().Ports {
		ports = append(ports, p.Name+":"+string(p.Protocol))
	}
	return []string{i.Name, dash(strings.Join(ports, ",")), strconv.Itoa(st.Healthy), strconv.Itoa(st.Instances), strconv.Itoa(st.Stale)}, nil
}

func instanceRow(a *app, i client.Item) ([]string, error) {
	var spec catalog.Instance
	var st client.InstanceStatus
	if err := decode(i, &spec, &st); err != nil {
		return nil, err
	}
	health := string(st.Health)
	switch {
	case st.Drain:
		health += ", draining"
	case st.Stale:
		health += ", stale"
	}
	var checks []string
	for _, c := range st.Checks {
		text := c.Name + ":" + string(c.Health)
		if c.Health != catalog.HealthPassing && c.Output != "" {
			text += " (" + strings.TrimSpace(c.Output) + ")"
		}
		checks = append(checks, text)
	}
	service := catalog.Name{Namespace: i.Ref.Parts[0], Name: i.Ref.Parts[1]}.Short()
	address := dash(spec.MeshAddress)
	if spec.External != "" && a.format != "csv" && a.format != "wide" {
		address += " → " + spec.External
	}
	var ports []string
	for _, p := range spec.Ports {
		ports = append(ports, fmt.Sprintf("%s:%d", p.Name, p.Port))
	}
	return []string{
		service, spec.Node, spec.ID, health, address, strconv.Itoa(max(1, spec.Weight)), dash(spec.Zone), dash(strings.Join(ports, ",")), dash(spec.External),
		dash(strings.Join(spec.Tags, ",")), dash(strings.Join(checks, "; ")),
	}, nil
}

func intentionRow(a *app, i client.Item) ([]string, error) {
	var spec intentions.Intention
	if err := decode(i, &spec, nil); err != nil {
		return nil, err
	}
	expires := "-"
	switch {
	case spec.Expires == nil:
	case a.format == "csv":
		expires = spec.Expires.UTC().Format(time.RFC3339)
	case time.Now().After(*spec.Expires):
		expires = "expired"
	default:
		expires = "in " + time.Until(*spec.Expires).Round(time.Second).String()
	}
	return []string{spec.Source, spec.Destination, spec.Summary(), expires, dash(spec.Reason), strconv.FormatUint(i.Revision, 10)}, nil
}

func decode(i client.Item, spec, status any) error {
	if err := json.Unmarshal(i.Spec, spec); err != nil {
		return err
	}
	if status == nil || len(i.Status) == 0 {
		return nil
	}
	return json.Unmarshal(i.Status, status)
}

// age is how long something lasts, for people; in CSV it is since when.
func (a *app) age(t time.Time) string {
	if a.format == "csv" && !t.IsZero() {
		return t.UTC().Format(time.RFC3339)
	}
	return since(t)
}

// ago is how long ago something was, for people; in CSV it is when.
func (a *app) ago(t time.Time) string {
	if text := a.age(t); a.format == "csv" || t.IsZero() {
		return text
	}
	return since(t) + " ago"
}

func since(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return time.Since(t).Round(time.Second).String()
}
