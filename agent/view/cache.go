package view

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/catalog"
)

// cacheFile is the name of the kept view in the state directory.
const cacheFile = "view.json"

// cacheFormat is raised when an older process could misread the file.
const cacheFormat = 1

type cached struct {
	Format   int              `json:"format"`
	Position catalog.Position `json:"position"`
	Alive    time.Time        `json:"alive"`
	Topics   []cachedTopic    `json:"topics"`
}

type cachedTopic struct {
	Topic
	Position catalog.Position `json:"position"`
	Items    []cachedItem     `json:"items"`
}

// cachedItem keeps the JSON as bytes: it must come back as it was sent.
type cachedItem struct {
	Key      string `json:"key"`
	Revision uint64 `json:"revision"`
	JSON     []byte `json:"json"`
}

// encodeCache returns the bytes that decodeCache reads.
func encodeCache(s *Snapshot, alive time.Time) ([]byte, error) {
	c := cached{Format: cacheFormat, Position: s.Position(), Alive: alive}
	for t, h := range s.topics {
		ct := cachedTopic{Topic: t, Position: h.position}
		for key, it := range h.items {
			ct.Items = append(ct.Items, cachedItem{Key: key, Revision: it.revision, JSON: it.json})
		}
		c.Topics = append(c.Topics, ct)
	}
	return json.Marshal(c)
}

// decodeCache reads what encodeCache wrote.
func decodeCache(data []byte) (*Snapshot, time.Time, error) {
	var c cached
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, time.Time{}, fmt.Errorf("read the kept view: %w", err)
	}
	if c.Format != cacheFormat {
		return nil, time.Time{}, fmt.Errorf("read the kept view: format %d, this build reads %d", c.Format, cacheFormat)
	}
	s := &Snapshot{position: c.Position, topics: make(map[Topic]*held, len(c.Topics))}
	for _, ct := range c.Topics {
		h := &held{position: ct.Position, items: make(map[string]item, len(ct.Items))}
		for _, it := range ct.Items {
			h.items[it.Key] = item{json: it.JSON, revision: it.Revision}
		}
		s.topics[ct.Topic] = h
	}
	return s, c.Alive, nil
}

// Load takes over what an earlier process kept. Call it before Run. A cache
// that is damaged or of another format is ignored, and said so: the servers
// have everything. An error means that the state directory can't be used.
func (v *View) Load() error {
	if v.cfg.Dir == (statedir.Dir{}) {
		return nil
	}
	data, err := v.cfg.Dir.Read(cacheFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, statedir.ErrCorrupt):
		v.ignored(err)
		return nil
	case err != nil:
		return fmt.Errorf("load the kept view: %w", err)
	}
	s, alive, err := decodeCache(data)
	if err != nil {
		v.ignored(err)
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.snapshot, v.alive, v.kept = s, alive, alive
	v.announce()
	return nil
}

func (v *View) ignored(err error) {
	v.cfg.Log.Error("the kept view is ignored: until a server is reached, this host knows no policy and refuses what comes in",
		slog.String("file", v.cfg.Dir.Path(cacheFile)), slog.Any("error", err))
}

// save writes the view if its content is not on disk, or an Alive that is more
// than lag newer than the one on disk. It reports whether disk is up to date.
func (v *View) save(lag time.Duration) bool {
	if v.cfg.Dir == (statedir.Dir{}) {
		return true
	}
	v.mu.Lock()
	s, alive := v.snapshot, v.alive
	unsaved := v.dirty || alive.Sub(v.kept) > lag
	v.dirty = false
	v.mu.Unlock()
	if !unsaved {
		return true
	}
	data, err := encodeCache(s, alive)
	if err == nil {
		err = v.cfg.Dir.Write(cacheFile, data)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		if v.saveError == "" {
			v.cfg.Log.Error("the view can't be kept: a restart without servers would not know the newest policy", slog.Any("error", err))
		}
		v.dirty, v.saveError = true, err.Error()
		return false
	}
	v.kept, v.saveError = alive, ""
	return true
}
