package rpc

import (
	"encoding/json"
	"log/slog"

	"github.com/meshd/meshd/server/state"
)

// announced returns host:port of all servers for agents, in order: what they say of
// themselves, or what this one was configured with while none has.
func announced(snapshot *state.Snapshot, advertise []string) []string {
	if all := snapshot.Addresses(); len(all) > 0 {
		return all
	}
	return advertise
}

// fillServers shows where the servers are. A server that announces itself again, at
// the same address, moves nobody.
func (f *feeds) fillServers() {
	changed := f.servers.refill(f.revision(), func(put func(string, []byte, uint64)) {
		for _, address := range announced(f.snapshot, f.advertise) {
			if shown := f.servers.get(address); shown != nil {
				put(address, shown.json, shown.revision)
				continue
			}
			raw, err := json.Marshal(map[string]string{"address": address})
			if err != nil {
				f.log.Error("the address of a server can't be encoded", slog.String("address", address), slog.Any("error", err))
				continue
			}
			put(address, raw, f.revision())
		}
	})
	if changed {
		f.servers.mark()
	}
}
