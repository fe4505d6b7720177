package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/meshd/meshd/proxy/feed"
)

// metricsSocket is the name under which the socket of the metrics travels, beside those of listeners.
const metricsSocket = "@metrics"

// predecessor is the process whose place this one takes, as seen from here.
type predecessor struct {
	link    *feed.Link
	sockets map[string]*os.File
	metrics *os.File
	// part is what came of counters whose frames are not all there.
	part []byte
	gone chan struct{}
}

// meetPredecessor takes what the process passes that started this one.
func meetPredecessor() (*predecessor, error) {
	link, err := feed.NewLink(os.NewFile(linkFD, "link"))
	if err != nil {
		return nil, fmt.Errorf("%w: --heir is for mesh-proxy itself", err)
	}
	d := &predecessor{link: link, sockets: map[string]*os.File{}, gone: make(chan struct{})}
	by := time.Now().Add(serveTimeout)
	for {
		f, files, err := link.Read(by)
		switch {
		case err != nil:
			return nil, fmt.Errorf("take over from the process that started this one: %w", err)
		case f.Sockets != nil:
			for i, name := range f.Sockets.Names {
				d.sockets[name] = files[i]
			}
		case f.Step != nil && f.Step.To == feed.HeirTake:
			d.metrics = d.sockets[metricsSocket]
			delete(d.sockets, metricsSocket)
			return d, nil
		}
	}
}

// takeOver returns once this process is to accept. Before that it may be told that it is not wanted: an error.
func (d *predecessor) takeOver(ctx context.Context, p *process) error {
	defer context.AfterFunc(ctx, d.link.Close)()
	wanted := make(chan error, 1)
	go func() {
		f, _, err := d.link.Read(time.Time{})
		if err == nil && (f.Step == nil || f.Step.To != feed.HeirServe) {
			err = errors.New("it said something else")
		}
		wanted <- err
	}()
	applied := p.applied
	for {
		select {
		case <-applied:
			applied = nil
			if err := d.link.Write(feed.Frame{Step: &feed.Step{To: feed.HeirReady}}); err != nil {
				return fmt.Errorf("tell the process that started this one: %w", err)
			}
		case err := <-wanted:
			if err != nil {
				return fmt.Errorf("the process that started this one is gone, or has given up waiting: %w", err)
			}
			return nil
		}
	}
}

// serving tells that this process accepts, and returns with what was counted before.
func (d *predecessor) serving(c *counters) error {
	if err := d.link.Write(feed.Frame{Step: &feed.Step{To: feed.HeirServing}}); err != nil {
		return err
	}
	by := time.Now().Add(serveTimeout)
	for {
		whole, err := d.count(c, by)
		if err != nil || whole {
			return err
		}
	}
}

// count reads one frame, and reports whether counters are whole with it.
func (d *predecessor) count(c *counters, by time.Time) (whole bool, err error) {
	f, _, err := d.link.Read(by)
	if err != nil {
		return false, err
	}
	if f.Counters == nil {
		return false, nil
	}
	d.part = append(d.part, f.Counters.Families...)
	if f.Counters.More {
		return false, nil
	}
	c.set(d.part, f.Counters.Generations)
	d.part = nil
	return true, nil
}

// follow takes what the process before this one counts while it drains, until it is gone.
func (d *predecessor) follow(c *counters) error {
	defer close(d.gone)
	defer d.link.Close()
	defer c.alone()
	for {
		if _, err := d.count(c, time.Time{}); err != nil {
			return nil // that is its end
		}
	}
}

// hurry has the process before this one end within a time.
func (d *predecessor) hurry(within time.Duration) {
	_ = d.link.Write(feed.Frame{Step: &feed.Step{To: feed.HeirEnd, Within: within}}) // it is gone otherwise
}

// wait returns once the process before this one is gone, or ctx ends.
func (d *predecessor) wait(ctx context.Context) {
	select {
	case <-d.gone:
	case <-ctx.Done():
	}
	d.link.Close()
	<-d.gone
}
