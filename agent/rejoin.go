package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/meshd/meshd/agent/join"
	"github.com/meshd/meshd/server/meshpb"
)

// refusalInterval is how often the agent looks whether the servers refuse this
// node and a token that would admit it has come.
const refusalInterval = time.Second

// followRefusal joins anew when the servers no longer know this node, or know
// another machine by its name, and an operator has put a new token into place.
// Until then everything goes on with what is held: a deleted node keeps its
// leaves to their end, as any agent does that is out of touch.
func (h *host) followRefusal(ctx context.Context) error {
	tick := time.NewTicker(refusalInterval)
	defer tick.Stop()
	var tried time.Time // the token file that did not help, by its time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch h.view.Status().Refused {
		case meshpb.ReasonNodeUnknown, meshpb.ReasonNodeReplaced:
		default:
			continue
		}
		info, err := os.Stat(h.cfg.Join.TokenFile)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.ModTime().Equal(tried) {
			continue
		}
		if err == nil {
			tried = info.ModTime()
			var identity *join.Identity
			if identity, err = h.join(ctx); err == nil {
				err = h.adopt(identity)
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			h.log.ErrorContext(ctx, "joining anew failed", slog.Any("error", err))
		default:
			h.log.InfoContext(ctx, "joined anew, because the servers no longer accepted the old identity", slog.String("node", h.cfg.NodeName))
			h.view.Reconnect()
			h.leaves.Retry()
		}
	}
}
