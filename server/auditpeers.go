package server

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
)

const (
	// auditPatience is how long another server may take to read its log.
	auditPatience = 5 * time.Second
	// auditPoll is how often a follower asks for news.
	auditPoll = time.Second
	// maxRemoteAudit bounds what one server tells another at a time.
	maxRemoteAudit = 2000
)

// clusterAudit is the audit log of all servers, as one of them reads it.
type clusterAudit struct{ *member }

var _ api.AuditLog = clusterAudit{}

// auditDemand is what one server asks another, as a question of peer.Fleet.
type auditDemand struct {
	Audit *client.AuditQuery `json:"audit"`
}

// auditPart is what one server's log holds.
type auditPart struct {
	Records []client.AuditRecord `json:"records"`
	// Last is the number of the newest record, whether it was asked for or not.
	Last uint64 `json:"last"`
}

// part reads this server's log.
func (l auditLog) part(ctx context.Context, q client.AuditQuery) (auditPart, error) {
	last := l.Stats().Seq // before the read, which may find more
	records, err := l.Log.Read(ctx, q)
	return auditPart{Records: records, Last: last}, err //nolint:wrapcheck // says what was read
}

// serveAudit answers another server, if that is what it asks for.
func (m *member) serveAudit(ctx context.Context, query []byte) (answer []byte, asked bool, err error) {
	var d auditDemand
	if err := json.Unmarshal(query, &d); err != nil || d.Audit == nil {
		return nil, false, nil //nolint:nilerr // it is another question
	}
	part, err := m.audit.part(ctx, *d.Audit)
	if err != nil {
		return nil, true, err
	}
	answer, err = json.Marshal(part)
	return answer, true, err //nolint:wrapcheck // our own type
}

// logs are the ways to the logs that are asked for, by server.
func (a clusterAudit) logs(only string) (map[string]func(context.Context, client.AuditQuery) (auditPart, error), error) {
	all := map[string]func(context.Context, client.AuditQuery) (auditPart, error){a.name: a.audit.part}
	if a.peer != nil {
		for _, p := range a.peers() {
			all[p.Name] = func(ctx context.Context, q client.AuditQuery) (part auditPart, err error) {
				ctx, cancel := context.WithTimeout(ctx, auditPatience)
				defer cancel()
				q.Limit = min(q.Limit, maxRemoteAudit)
				query, err := json.Marshal(auditDemand{Audit: &q})
				if err != nil {
					return part, fmt.Errorf("ask %s: %w", p.Name, err)
				}
				answer, err := p.Fleet(ctx, query)
				if err != nil {
					return part, err
				}
				if err := json.Unmarshal(answer, &part); err != nil {
					return part, fmt.Errorf("read the answer of %s: %w", p.Name, err)
				}
				return part, nil
			}
		}
	}
	if only == "" {
		return all, nil
	}
	one, ok := all[only]
	if !ok {
		return nil, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("there is no server %q", only), Next: fmt.Sprintf("the servers are %v", slices.Sorted(maps.Keys(all))),
		}
	}
	return map[string]func(context.Context, client.AuditQuery) (auditPart, error){only: one}, nil
}

// gather asks all logs at once, each for what follows after. It moves after on.
func (a clusterAudit) gather(ctx context.Context, q client.AuditQuery, after map[string]uint64) (client.AuditLog, error) {
	logs, err := a.logs(q.Server)
	if err != nil {
		return client.AuditLog{}, err
	}
	out := client.AuditLog{Records: []client.AuditRecord{}}
	var mu sync.Mutex
	var asking sync.WaitGroup
	for name, read := range logs {
		q := q
		mu.Lock() // those asked already may have answered
		q.After = max(q.After, after[name])
		mu.Unlock()
		asking.Go(func() {
			part, err := read(ctx, q)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.Silent = append(out.Silent, fmt.Sprintf("%s: %v", name, err))
				return
			}
			out.Records = append(out.Records, part.Records...)
			newest := q.After
			if n := len(part.Records); n > 0 {
				newest = part.Records[n-1].Seq
			}
			if q.After == 0 || len(part.Records) < min(q.Limit, maxRemoteAudit) { // nothing was left out
				newest = max(newest, part.Last)
			}
			after[name] = newest
		})
	}
	asking.Wait()
	slices.Sort(out.Silent)
	slices.SortStableFunc(out.Records, func(a, b client.AuditRecord) int {
		if a.Server == b.Server {
			return cmp.Compare(a.Seq, b.Seq)
		}
		return a.Time.Compare(b.Time)
	})
	return out, ctx.Err() //nolint:wrapcheck // the caller's own
}

// Read implements api.AuditLog.
func (a clusterAudit) Read(ctx context.Context, q client.AuditQuery) (client.AuditLog, error) {
	if q.After > 0 && q.Server == "" {
		return client.AuditLog{}, &client.Error{Code: client.CodeInvalid, Message: "after is a number in one server's log: name the server, too"}
	}
	q.Limit = cmp.Or(q.Limit, defaultAudit)
	out, err := a.gather(ctx, q, map[string]uint64{})
	if q.After == 0 {
		out.Records = out.Records[max(0, len(out.Records)-q.Limit):]
	}
	return out, err
}

// defaultAudit is how many records are shown unless somebody says otherwise.
const defaultAudit = 100

// Follow implements api.AuditLog.
func (a clusterAudit) Follow(ctx context.Context, q client.AuditQuery, emit func(client.AuditLog) error) error {
	q.Limit = cmp.Or(q.Limit, defaultAudit)
	after := map[string]uint64{}
	tick := time.NewTicker(auditPoll)
	defer tick.Stop()
	var silent []string
	for first := true; ; first = false {
		out, err := a.gather(ctx, q, after)
		if err != nil {
			return err
		}
		if first {
			out.Records = out.Records[max(0, len(out.Records)-q.Limit):]
			q.Limit = maxRemoteAudit // from now on all are wanted
		}
		now := out.Silent
		if slices.Equal(now, silent) {
			out.Silent = nil // that was told
		}
		silent = now
		if len(out.Records)+len(out.Silent) > 0 {
			if err := emit(out); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case <-tick.C:
		}
	}
}
