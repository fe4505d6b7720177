package feed

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/meshd/meshd/proxy"
)

// offer gives the agent the sockets that it did not pass, so that they outlive this process.
func (c *Client) offer(ctx context.Context) {
	var names []string
	var files []*os.File
	flush := func() {
		if len(names) > 0 && c.conn != nil {
			c.write(ctx, Frame{Sockets: &Sockets{Names: names}}, files)
		}
		names, files = nil, nil
	}
	for _, name := range slices.Sorted(maps.Keys(c.sockets)) {
		if s := c.sockets[name]; s.own {
			names, files = append(names, name), append(files, s.file)
		}
		if len(names) == maxDescriptors {
			flush()
		}
	}
	flush()
}

func (c *Client) takeSockets(s *Sockets, files []*os.File) {
	if c.now() == Draining {
		closeFiles(files)
		return
	}
	for i, name := range s.Names {
		if old, ok := c.sockets[name]; ok {
			_ = old.file.Close()
		}
		c.sockets[name] = &clientSocket{file: files[i]}
	}
	for _, name := range s.Close {
		if old, ok := c.sockets[name]; ok {
			_ = old.file.Close()
			delete(c.sockets, name)
		}
	}
}

// openMissing opens the sockets of the plan that are not there, and reports whether it opened any.
func (c *Client) openMissing(ctx context.Context) bool {
	opened := false
	for _, l := range c.config.Listeners {
		if _, ok := c.sockets[l.Name]; ok {
			continue
		}
		file, err := Listen(ctx, l)
		if err != nil {
			if c.failed[l.Name] != err.Error() { // each cause once, not each second
				c.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "listener could not be opened, it is tried again",
					slog.String("listener", l.Name), slog.Any("error", err))
			}
			c.failed[l.Name] = err.Error()
			continue
		}
		delete(c.failed, l.Name)
		c.sockets[l.Name] = &clientSocket{file: file, own: true}
		opened = true
	}
	return opened
}

// dropOwnSockets closes the sockets that no agent looks after and the plan no longer names.
func (c *Client) dropOwnSockets(cfg proxy.Config) {
	named := make(map[string]bool, len(cfg.Listeners))
	for _, l := range cfg.Listeners {
		named[l.Name] = true
	}
	var gone []string
	for name, s := range c.sockets {
		if s.own && !named[name] {
			Remove(s.file)
			delete(c.sockets, name)
			gone = append(gone, name)
		}
	}
	if len(gone) > 0 && c.conn != nil {
		slices.Sort(gone)
		_ = c.conn.write(Frame{Sockets: &Sockets{Close: gone}}, nil)
	}
}

func (c *Client) closeSockets() {
	for name, s := range c.sockets {
		_ = s.file.Close()
		delete(c.sockets, name)
	}
}
