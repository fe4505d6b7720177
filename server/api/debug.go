package api

import (
	"runtime/pprof"

	"github.com/meshd/meshd/server/client"
)

// debug shows one part of a support bundle that only the server knows.
func (a *API) debug(c *call) (any, error) {
	switch part := c.PathValue("part"); part {
	case "config":
		return a.cfg.Settings, nil
	case "goroutines":
		return c.profile("goroutine", 2)
	case "heap":
		return c.profile("heap", 0)
	default:
		return nil, notFound("part", part, client.DebugParts())
	}
}

// profile answers with one of the runtime's: stacks with addresses, and no
// contents of memory.
func (c *call) profile(name string, form int) (any, error) {
	c.out.Header().Set("Content-Type", "application/octet-stream")
	_ = pprof.Lookup(name).WriteTo(c.out, form) // the client is gone: nobody to tell
	return written{}, nil
}
