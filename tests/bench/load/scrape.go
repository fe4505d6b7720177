package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Scrape fetches a page of metrics, as Prometheus would, and returns the series
// without labels that is called name; with an empty name it returns 0.
func Scrape(ctx context.Context, url, name string) (value float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	found := name == ""
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if key, text, _ := strings.Cut(lines.Text(), " "); !found && key == name {
			if value, err = strconv.ParseFloat(text, 64); err != nil {
				return 0, fmt.Errorf("GET %s: %s: %w", url, name, err)
			}
			found = true
		}
	}
	if !found {
		return 0, errors.Join(lines.Err(), fmt.Errorf("GET %s: no %s", url, name))
	}
	return value, lines.Err()
}
