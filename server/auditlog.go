package server

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/audit"
	"github.com/meshd/meshd/server/client"
)

// Audit is the block audit of server.hcl.
type Audit struct {
	// FileMiB is the size at which a new file is begun, 64 by default; Retain how
	// many finished ones are kept beside it, 16 by default.
	FileMiB int `json:"file_mib,omitempty"`
	Retain  int `json:"retain,omitempty"`
}

func (c Audit) withDefaults() Audit {
	return Audit{FileMiB: cmp.Or(c.FileMiB, 64), Retain: cmp.Or(c.Retain, 16)}
}

func (c Audit) validate(p *catalog.Problems) {
	if c.FileMiB < 0 {
		p.Add("audit.file_mib", "%d is negative", c.FileMiB)
	}
	if c.Retain < 0 {
		p.Add("audit.retain", "%d is negative", c.Retain)
	}
}

// auditLog is this server's audit log, as the API wants it.
type auditLog struct {
	*audit.Log
	server string
}

var _ api.AuditLog = auditLog{}

// newAuditLog returns the log in the server's state directory.
func newAuditLog(config Config, server string, key ca.ClusterKey, log *slog.Logger) (auditLog, error) {
	secret, err := key.Derive("audit")
	if err != nil {
		return auditLog{}, fmt.Errorf("open the audit log: %w", err)
	}
	return auditLog{server: server, Log: audit.New(audit.Config{
		Dir: filepath.Join(config.DataDir, "audit"), Server: server, Key: secret,
		FileBytes: int64(config.Audit.FileMiB) << 20, Files: config.Audit.Retain,
	}, log)}, nil
}

// note is api.Config.Audit.
func (l auditLog) note(r api.AuditRecord) { l.Note(auditRecord(r)) }

// reserve is api.Config.Reserve.
func (l auditLog) reserve() (func(api.AuditRecord), error) {
	keep, err := l.Reserve()
	if err != nil {
		return nil, err //nolint:wrapcheck // says what is wrong
	}
	return func(r api.AuditRecord) { keep(auditRecord(r)) }, nil
}

func auditRecord(r api.AuditRecord) client.AuditRecord {
	out := client.AuditRecord{
		Time: r.Time, RequestID: r.RequestID, Who: r.Who, Title: r.Title, Remote: r.Remote,
		Verb: string(r.Verb), Resource: string(r.Resource), Namespace: r.Namespace, Name: r.Name, Method: r.Method, Route: r.Route,
		Outcome: string(r.Outcome), Status: r.Status, Code: r.Code, Revision: r.Revision, Omitted: r.Omitted,
	}
	for _, c := range r.Changes {
		out.Changes = append(out.Changes, client.AuditChange(c))
	}
	return out
}

// Read implements api.AuditLog.
func (l auditLog) Read(ctx context.Context, q client.AuditQuery) (client.AuditLog, error) {
	if q.Server != "" && q.Server != l.server {
		return client.AuditLog{}, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("the audit log of server %q is not here, this is %q", q.Server, l.server), Next: "ask that server: --addr",
		}
	}
	records, err := l.Log.Read(ctx, q)
	return client.AuditLog{Records: records}, err //nolint:wrapcheck // says what was read
}

// Follow implements api.AuditLog.
func (l auditLog) Follow(ctx context.Context, q client.AuditQuery, emit func(client.AuditLog) error) error {
	for first := true; ; first = false {
		changed, seen := l.Changed(), l.Stats().Seq
		answer, err := l.Read(ctx, q)
		if err != nil {
			return err
		}
		n := len(answer.Records)
		if n > 0 {
			if err := emit(answer); err != nil {
				return err
			}
			q.After = answer.Records[n-1].Seq
		}
		if first { // those were the newest; from now on all are wanted
			q.Limit = client.MaxAudit
		} else if n == q.Limit {
			continue // there may be more
		}
		q.After = max(q.After, seen)
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller's own
		case <-changed:
		}
	}
}
