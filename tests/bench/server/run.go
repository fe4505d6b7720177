package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	meshName   = "meshd"
	versusName = "versus" // another build of meshd
	etcdName   = "etcd"
	bareName   = "raft"
)

// run measures what the options say and writes the report.
func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "bench-")
	if err != nil {
		return err
	}
	defer func() {
		if !o.keep {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	f := &field{options: o, dir: dir, report: newReport(ctx, o), clusters: map[string]*cluster{}}
	defer func() { err = errors.Join(err, f.close()) }()
	began := time.Now()
	err = f.measure(ctx)
	if ctx.Err() != nil {
		return err
	}
	f.report.Took = time.Since(began).Round(time.Second)
	// What was measured is worth telling, even if something failed.
	return errors.Join(err, f.report.write(os.Stdout))
}

// field is the stores of a run.
type field struct {
	options  options
	dir      string
	report   *report
	clusters map[string]*cluster
	begun    int // clusters, so that each has a directory of its own
}

// measure goes through the parts. Stores that a part does not need are ended
// before it.
func (f *field) measure(ctx context.Context) error {
	o := f.options
	for _, part := range []struct {
		name   string
		stores []string
		run    func(context.Context, *report, []*cluster) error
	}{
		{partWrites, o.stores, o.writes},
		{partFailover, []string{meshName, bareName}, o.kills},
		{partStop, []string{meshName, bareName}, o.stops},
		{partBusy, []string{meshName, bareName}, func(ctx context.Context, r *report, clusters []*cluster) error {
			return o.busy(ctx, r, f.dir, clusters)
		}},
		{partLoad, []string{meshName}, o.load},
	} {
		if !o.has(part.name) {
			continue
		}
		var takePart []string
		for _, name := range part.stores {
			if slices.Contains(o.stores, name) {
				takePart = append(takePart, name)
			}
		}
		clusters, err := f.only(ctx, takePart)
		if err == nil {
			err = part.run(ctx, f.report, clusters)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil: // the other parts begin anew
			f.report.fail(fmt.Sprintf("%s: %v", part.name, errors.Join(err, f.close())))
			f.clusters = map[string]*cluster{}
		}
	}
	return nil
}

// only sees to it that these stores run and no others.
func (f *field) only(ctx context.Context, names []string) ([]*cluster, error) {
	for name, c := range f.clusters {
		if !slices.Contains(names, name) {
			delete(f.clusters, name)
			if err := c.close(); err != nil {
				return nil, err
			}
		}
	}
	var out []*cluster
	for _, name := range names {
		if f.clusters[name] == nil {
			f.begun++
			s, err := f.options.store(name, filepath.Join(f.dir, fmt.Sprintf("%s-%d", name, f.begun)))
			if err != nil {
				return nil, err
			}
			// What began is kept even if the start failed, so that it is ended.
			if f.clusters[name], err = begin(ctx, name, s, f.options.servers); err != nil {
				return nil, err
			}
		}
		out = append(out, f.clusters[name])
	}
	return out, nil
}

func (f *field) close() error {
	var errs []error
	for _, c := range f.clusters {
		errs = append(errs, c.close())
	}
	return errors.Join(errs...)
}

// store makes a store on loopback addresses that nobody else is likely to use.
func (o options) store(name, dir string) (store, error) {
	net := fmt.Sprintf("127.%d.%d", 10+rand.N(240), rand.N(250))
	var hosts []string
	for i := range o.servers {
		hosts = append(hosts, fmt.Sprintf("%s.%d", net, i+1))
	}
	switch name {
	case etcdName:
		return newEtcdStore(o.etcd, dir, hosts)
	case bareName:
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		return newBareStore(o.self, dir, hosts), nil
	case versusName:
		return newMeshStore(o.versus, dir, hosts)
	default:
		return newMeshStore(o.meshd, dir, hosts)
	}
}
