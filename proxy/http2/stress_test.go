package http2_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// sized is a reader of n bytes of one letter, which fails if it is read with
// fail set after half of them.
type sized struct {
	letter byte
	left   int
	fail   int
}

var errGivenUp = errors.New("the client gives up")

func (s *sized) Read(p []byte) (int, error) {
	switch {
	case s.left == 0:
		return 0, io.EOF
	case s.left <= s.fail:
		return 0, errGivenUp
	}
	n := min(len(p), s.left-s.fail)
	for i := range n {
		p[i] = s.letter
	}
	s.left -= n
	return n, nil
}

// Many exchanges at once over few connections, of which many are given up in
// every state: nobody gets another's bytes, nothing hangs, and each exchange is
// told of once.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	far := serve(t, handler(func(ex *l7.Exchange) l7.Response {
		switch {
		case string(ex.Request.Path) == "/hang":
			return &hanging{}
		case string(ex.Request.Path) == "/early":
			return ex.Fail(&l7.Error{Reason: l7.Denied})
		}
		return echo(ex)
	}), func(c *http2.ServerConfig) { c.Bounds.Resets = 1 << 20 })
	plain := over1(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hang":
			if _, err := io.Copy(io.Discard, r.Body); err == nil { // only then net/http looks for the end of the connection
				<-r.Context().Done()
			}
		case "/early":
			w.WriteHeader(http.StatusForbidden)
		default:
			b, err := io.ReadAll(r.Body)
			switch {
			case err != nil:
				panic(http.ErrAbortHandler)
			case len(b) == 0:
				b = []byte("no body")
			}
			_, _ = w.Write(b)
		}
	})
	for name, up := range map[string]l7.Upstream{
		"HTTP/2": newPool(t, far.addr, func(c *http2.PoolConfig) { c.MaxConns = 2 }),
		"HTTP/1": plain,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			near := serve(t, p2h(up), func(c *http2.ServerConfig) { c.Bounds.Resets = 1 << 20 })
			c := client(t)
			var wg sync.WaitGroup
			const workers, each = 24, 60
			for worker := range workers {
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(1, uint64(worker)))
					for i := range each {
						if problem := one(t.Context(), c, near.addr, rnd); problem != "" {
							t.Errorf("worker %d, request %d: %s", worker, i, problem)
						}
					}
				})
			}
			wg.Wait()
			if t.Failed() { // what the proxy thinks about it
				near.tell(t)
				far.tell(t)
			}
			for range workers * each / 2 { // of those that were given up before they began there is none
				near.recs.next(t)
			}
		})
	}
}

// one sends one request, and says what is wrong with its answer.
func one(ctx context.Context, c *http.Client, addr string, rnd *rand.Rand) string {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	size := []int{0, 1, 100, 5000, 70_000, 200_000}[rnd.IntN(6)]
	letter := byte('a' + rnd.IntN(26))
	body := &sized{letter: letter, left: size}
	kind := rnd.IntN(8)
	path := "/"
	switch kind {
	case 0:
		path = "/hang"
		stop := time.AfterFunc(time.Duration(rnd.IntN(3000))*time.Microsecond, cancel)
		defer stop.Stop()
	case 1:
		path = "/early"
	case 2: // given up at any moment
		stop := time.AfterFunc(time.Duration(rnd.IntN(3000))*time.Microsecond, cancel)
		defer stop.Stop()
	case 3:
		body.fail = size / 2
	}
	var in io.Reader
	if size > 0 {
		in = body
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+path, in)
	if err != nil {
		return err.Error()
	}
	resp, err := c.Do(req)
	if err != nil {
		if kind == 0 || kind == 2 || kind == 3 && body.fail > 0 {
			return ""
		}
		return fmt.Sprintf("kind %d, %d bytes to %s: %v", kind, size, path, err)
	}
	defer resp.Body.Close() //nolint:errcheck // the end of it
	if kind == 4 && rnd.IntN(2) == 0 {
		return "" // the answer is not read
	}
	got, err := io.ReadAll(resp.Body)
	want := strings.Repeat(string(letter), size)
	if size == 0 {
		want = "no body"
	}
	switch {
	case kind == 1:
		if resp.StatusCode != http.StatusForbidden {
			return "status " + resp.Status
		}
		return ""
	case strings.Trim(string(got), string(letter)) != "" && size > 0 && resp.StatusCode == http.StatusOK:
		return fmt.Sprintf("bytes of somebody else: %.40q", got)
	case kind == 0 || kind == 2 || kind == 3 && body.fail > 0:
		if kind == 3 && err == nil && resp.StatusCode == http.StatusOK {
			return "half a body came out as a whole one"
		}
		return ""
	case err != nil:
		return fmt.Sprintf("kind %d, %d bytes to %s: %s, %d bytes came: %v", kind, size, path, resp.Status, len(got), err)
	case resp.StatusCode != http.StatusOK || string(got) != want:
		return fmt.Sprintf("%s, %d bytes, want %d", resp.Status, len(got), len(want))
	}
	return ""
}
