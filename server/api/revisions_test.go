package api_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"testing"

	"github.com/meshd/meshd/server/client"
)

// TestRevisionIsTheWriters: of many who write one resource, each is told a revision of
// his own. With that of a later write he would overwrite it by compare-and-set,
// without ever having seen it.
func TestRevisionIsTheWriters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var mu sync.Mutex
	writers := map[uint64]string{}
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			for n := range 40 {
				owner := fmt.Sprintf("w%d-%d", i, n)
				status, body := call(t, http.MethodPut, w.url+"/v1/services/default/api", w.token, `{"namespace":"default","name":"api","owner":"`+owner+`"}`)
				if status == http.StatusServiceUnavailable {
					continue // too many wrote at the same time
				}
				var result client.Result
				if err := json.Unmarshal([]byte(body), &result); err != nil || status != http.StatusOK || len(result.Changes) != 1 {
					t.Errorf("%d %s: %v", status, body, err)
					return
				}
				revision := result.Changes[0].Revision
				mu.Lock()
				if other, taken := writers[revision]; taken {
					t.Errorf("revision %d is told to the writers of %s and %s", revision, other, owner)
				}
				writers[revision] = owner
				mu.Unlock()
			}
		})
	}
	all.Wait()
}
