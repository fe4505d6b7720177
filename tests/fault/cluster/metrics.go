package cluster

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"time"
)

// Metric reads one figure without labels of what the server tells Prometheus.
func (s *Server) Metric(ctx context.Context, name string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	text, err := s.Dial(s.Socket()).Metrics(ctx)
	if err != nil {
		return 0, fmt.Errorf("read the metrics of %s: %w", s.Name, err)
	}
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name+" ")); ok {
			return strconv.ParseFloat(string(bytes.TrimSpace(rest)), 64) //nolint:wrapcheck // it says what it read
		}
	}
	return 0, fmt.Errorf("%w: the metrics of %s lack %s", errAnswer, s.Name, name)
}
