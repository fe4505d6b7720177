package server

import "sync"

// LiveKeys are the keys of server.hcl that Apply changes while the server runs;
// StartKeys those that are looked at only when it starts.
func LiveKeys() []string {
	return []string{
		"snapshots.enabled", "snapshots.interval", "snapshots.retain", "snapshots.retain_days", "snapshots.max_mib",
		"autopilot.remove_dead_after", "log_level",
	}
}

// StartKeys are those that are looked at only while a server begins or joins its
// cluster.
func StartKeys() []string { return []string{"bootstrap_expect", "bootstrap_token_file", "retry_join"} }

// live is the configuration with what has changed since the start.
type live struct {
	mu      sync.Mutex
	config  Config
	changed chan struct{}
}

func (l *live) now() Config {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.config
}

// next returns a channel that is closed at the next change.
func (l *live) next() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// Apply takes over LiveKeys of a valid configuration, but log_level, which is the
// caller's; the others stay as they were at the start.
func (s *Server) Apply(config Config) {
	config = config.withDefaults()
	s.live.mu.Lock()
	defer s.live.mu.Unlock()
	dir := s.live.config.Snapshots.Dir
	s.live.config.Snapshots, s.live.config.Autopilot = config.Snapshots, config.Autopilot
	s.live.config.Snapshots.Dir = dir
	close(s.live.changed)
	s.live.changed = make(chan struct{})
}
