// Package registry knows the services of this host: it reads the folder of
// definitions, follows its changes, and keeps the servers' records equal to it.
//
// Files are the truth, but a slip of the hand takes nothing down: a file that
// can't be read, or that clashes with another, leaves its last good version
// running, through a restart of the agent too, and says why. A change that is
// bad or that takes an instance away must hold still for a moment before it
// counts, because files are written in parts and editors move them about.
package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
)

const (
	// debounce is how long the folder must be quiet before it is read.
	debounce = 100 * time.Millisecond
	// settle is how long a bad change, or one that takes an instance away, must
	// stay the same before it counts.
	settle = time.Second
	// defaultPoll finds what notifications missed: network file systems,
	// swapped symbolic links, an exhausted inotify.
	defaultPoll = 5 * time.Second
	// maxFile bounds one file.
	maxFile = 1 << 20
	// keptFile holds the last good version of every file.
	keptFile = "services.json"
)

// Config is what a Registry needs.
type Config struct {
	Log *slog.Logger
	// Folder is services.d: its *.hcl, *.yaml, *.yml and *.json are read.
	Folder string
	// Dir is where last good versions are kept.
	Dir statedir.Dir
	// Poll is how often the folder is read without a notification; 5 s if zero.
	Poll time.Duration
}

// File is the state of one file of the folder.
type File struct {
	Name string `json:"name"`
	// Services are the instances that it runs, as "namespace/service/id".
	Services []string `json:"services"`
	// Problems are why its newest version does not run, each as
	// "file:line: field: problem"; the version before it does.
	Problems []string `json:"problems,omitempty"`
}

// Registry holds the definitions of this host. It is safe for concurrent use.
type Registry struct {
	cfg    Config
	reload chan struct{}

	mu       sync.Mutex
	files    map[string]*file
	readErr  string // why the folder can't be read
	snapshot []catalog.Definition
	changed  chan struct{}
}

// file is what is known of one file.
type file struct {
	running  version // in force; its definitions are never changed
	rejected version // newest version, not in force
	problems []string
	// waiting is a version that must settle first, since when.
	waiting version
	since   time.Time
	// settling says that the newest version is not judged yet.
	settling bool
}

// version is one content of a file. Its zero value is a file that is not there.
type version struct {
	there       bool
	data        []byte
	definitions []catalog.Definition
	err         error
}

func (v version) equal(o version) bool { return v.there == o.there && bytes.Equal(v.data, o.data) }

// New returns a Registry that has read nothing.
func New(cfg Config) *Registry {
	if cfg.Poll == 0 {
		cfg.Poll = defaultPoll
	}
	return &Registry{
		cfg: cfg, reload: make(chan struct{}, 1), files: map[string]*file{}, changed: make(chan struct{}),
	}
}

// Load takes over the versions that were in force when the last process ended,
// and reads the folder once. What is bad is reported at once: there is nobody
// who writes yet. Call it before Run. An error means that the state directory
// can't be used.
func (r *Registry) Load() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	data, err := r.cfg.Dir.Read(keptFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, statedir.ErrCorrupt):
		r.cfg.Log.Error("the kept service definitions are ignored", slog.Any("error", err))
	case err != nil:
		return fmt.Errorf("load the kept service definitions: %w", err)
	default:
		r.takeOver(data)
	}
	r.scan(time.Now(), 0)
	r.publish()
	return nil
}

func (r *Registry) takeOver(data []byte) {
	var kept map[string][]byte
	if err := json.Unmarshal(data, &kept); err != nil {
		r.cfg.Log.Error("the kept service definitions are ignored", slog.Any("error", err))
		return
	}
	for name, content := range kept {
		if v := parse(name, content); v.err == nil {
			r.files[name] = &file{running: v}
		}
	}
}

// Definitions returns the valid definitions in force, no instance twice, sorted
// by service and ID. They must not be changed.
func (r *Registry) Definitions() []catalog.Definition {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.snapshot
}

// Changed returns a channel that is closed when Definitions or Files change.
// Get it before them.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Files returns the state of every file, sorted by name, and why the folder
// itself can't be read, if it can't.
func (r *Registry) Files() ([]File, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []File
	for _, name := range slices.Sorted(maps.Keys(r.files)) {
		f := r.files[name]
		out := File{Name: name, Services: []string{}, Problems: slices.Clone(f.problems)}
		for _, d := range f.running.definitions {
			out.Services = append(out.Services, Key(d))
		}
		all = append(all, out)
	}
	return all, r.readErr
}

// Key names an instance on its node: "namespace/service/id".
func Key(d catalog.Definition) string { return d.Ref().String() + "/" + d.InstanceID() }

// Reload makes Run read the folder now.
func (r *Registry) Reload() {
	select {
	case r.reload <- struct{}{}:
	default:
	}
}

// Run follows the folder until ctx ends. It returns nil. Call it once.
func (r *Registry) Run(ctx context.Context) error {
	watcher, events := r.watch(ctx)
	if watcher != nil {
		defer func() { _ = watcher.Close() }()
	}
	timer := time.NewTimer(debounce)
	defer timer.Stop()
	watched := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			timer.Reset(debounce)
			continue
		case <-r.reload:
		case <-timer.C:
		}
		if watcher != nil && !watched {
			// The folder may be made later; adding it again costs nothing.
			watched = watcher.Add(r.cfg.Folder) == nil
		}
		r.mu.Lock()
		next := r.scan(time.Now(), settle)
		if r.readErr != "" {
			watched = false
		}
		r.mu.Unlock()
		timer.Reset(min(next, r.cfg.Poll))
	}
}

// watch starts notifications. Without them polling does.
func (r *Registry) watch(ctx context.Context) (*fsnotify.Watcher, <-chan fsnotify.Event) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		r.cfg.Log.WarnContext(ctx, "no file notifications: changes are found by polling", slog.Any("error", err))
		return nil, nil
	}
	go func() {
		for range watcher.Errors { // an overflow is made good by polling; closed with the watcher
		}
	}()
	return watcher, watcher.Events
}

// scan reads the folder and puts in force what has changed and settled. It
// returns when to look again. r.mu is held.
func (r *Registry) scan(now time.Time, settle time.Duration) time.Duration {
	found, err := r.readFolder()
	if err != nil {
		if r.readErr != err.Error() {
			r.cfg.Log.Error("the folder of service definitions can't be read; what ran goes on", slog.Any("error", err))
			r.readErr = err.Error()
			r.announce()
		}
		return r.cfg.Poll
	}
	next := r.cfg.Poll
	before := r.describe()
	candidates := map[string]version{}
	for name := range r.files {
		if _, ok := found[name]; !ok {
			found[name] = version{}
		}
	}
	for name, newest := range found {
		f := r.files[name]
		if f == nil {
			f = &file{}
			r.files[name] = f
		}
		candidates[name], f.settling = newest, false
		if newest.equal(f.running) || newest.err == nil && !removes(f.running, newest) {
			f.waiting, f.since = version{}, time.Time{}
			continue
		}
		if newest.equal(f.rejected) {
			continue // settled and said before
		}
		if f.since.IsZero() || !newest.equal(f.waiting) {
			f.waiting, f.since = newest, now
		}
		if left := settle - now.Sub(f.since); left > 0 {
			next = min(next, left)
			candidates[name], f.settling = f.running, true
		}
	}
	r.decide(candidates)
	r.readErr = ""
	if after := r.describe(); after != before {
		r.publish()
		r.keep()
		r.announce()
	}
	return next
}

// removes reports whether an instance of the version before is not in the one
// after.
func removes(before, after version) bool {
	return slices.ContainsFunc(before.definitions, func(d catalog.Definition) bool {
		return !slices.ContainsFunc(after.definitions, func(o catalog.Definition) bool { return Key(o) == Key(d) })
	})
}

// decide puts the candidates in force, but for bad ones and those that clash.
func (r *Registry) decide(candidates map[string]version) {
	names := slices.Sorted(maps.Keys(candidates))
	chosen := map[string]version{}
	problems := map[string][]string{}
	for _, name := range names {
		chosen[name] = candidates[name]
		if err := candidates[name].err; err != nil {
			chosen[name] = r.files[name].running
			problems[name] = strings.Split(err.Error(), "\n")
		}
	}
	// Versions in force do not clash with each other, so every round moves one
	// file back to the version that is in force: it ends.
	for range names {
		loser, winner, d := r.clash(names, chosen)
		if loser == "" {
			break
		}
		chosen[loser] = r.files[loser].running
		problems[loser] = append(problems[loser], fmt.Sprintf("%s: id: service %s with id %q is defined in %s too: give one of them another id",
			loser, d.Ref().Short(), d.InstanceID(), winner))
	}
	for _, name := range names {
		f := r.files[name]
		switch {
		case f.settling:
		case problems[name] == nil:
			f.running, f.rejected, f.problems = chosen[name], version{}, nil
			if f.running.equal(candidates[name]) {
				f.since = time.Time{}
			}
		default:
			r.reject(name, f, candidates[name], problems[name])
		}
		if !f.running.there && !candidates[name].there && !f.settling {
			delete(r.files, name)
		}
	}
}

// reject records why a version does not run, and logs it once.
func (r *Registry) reject(name string, f *file, v version, problems []string) {
	if !slices.Equal(f.problems, problems) {
		for _, p := range problems {
			r.cfg.Log.Error("bad service definition; the version before it runs on", slog.String("file", name), slog.String("problem", p),
				slog.Bool("runs_earlier_version", f.running.there))
		}
	}
	f.rejected, f.problems = v, problems
}

// clash finds two files that define one instance: the loser is the one for
// which that is new.
func (r *Registry) clash(names []string, chosen map[string]version) (loser, winner string, d catalog.Definition) {
	owner := map[string]string{}
	for _, name := range names {
		for _, d := range chosen[name].definitions {
			first, taken := owner[Key(d)]
			if !taken {
				owner[Key(d)] = name
				continue
			}
			if chosen[name].equal(r.files[name].running) {
				return first, name, d
			}
			return name, first, d
		}
	}
	return "", "", catalog.Definition{}
}

// readFolder returns every file of the folder that can be read.
func (r *Registry) readFolder() (map[string]version, error) {
	entries, err := os.ReadDir(r.cfg.Folder)
	if err != nil {
		return nil, fmt.Errorf("read service definitions: %w", err)
	}
	found := map[string]version{}
	for _, e := range entries {
		name := e.Name()
		switch filepath.Ext(name) {
		case ".hcl", ".yaml", ".yml", ".json":
		default:
			continue
		}
		if strings.HasPrefix(name, ".") || e.IsDir() {
			continue
		}
		found[name] = read(filepath.Join(r.cfg.Folder, name), name)
	}
	return found, nil
}

func read(path, name string) version {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return version{} // removed since the folder was listed, or a dangling link
	}
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("no regular file")
	}
	if err == nil && info.Size() > maxFile {
		err = fmt.Errorf("%d bytes, at most %d are read", info.Size(), maxFile)
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path) //nolint:gosec // the operator's own folder
	}
	if err != nil {
		return version{there: true, data: []byte(err.Error()), err: fmt.Errorf("%s: %w", name, err)}
	}
	return parse(name, data)
}

func parse(name string, data []byte) version {
	v := version{there: true, data: data}
	if v.definitions, v.err = manifest.Definitions(name, data); v.err != nil {
		v.definitions = nil
	}
	return v
}

// describe says what is in force and what is wrong, to tell a change.
func (r *Registry) describe() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r.files)) {
		f := r.files[name]
		fmt.Fprintf(&b, "%q %t %q %q\n", name, f.running.there, f.running.data, f.problems)
	}
	return b.String() + r.readErr
}

// publish makes the snapshot of what is in force.
func (r *Registry) publish() {
	var all []catalog.Definition
	for _, f := range r.files {
		all = append(all, f.running.definitions...)
	}
	slices.SortFunc(all, func(a, b catalog.Definition) int { return strings.Compare(Key(a), Key(b)) })
	r.snapshot = all
}

func (r *Registry) announce() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// keep writes what is in force to disk. It is for the next process only: when
// that fails, this one goes on.
func (r *Registry) keep() {
	kept := map[string][]byte{}
	for name, f := range r.files {
		if f.running.there {
			kept[name] = f.running.data
		}
	}
	data, err := json.Marshal(kept)
	if err == nil {
		err = r.cfg.Dir.Write(keptFile, data)
	}
	if err != nil {
		r.cfg.Log.Error("the service definitions in force can't be kept for a restart", slog.Any("error", err))
	}
}
