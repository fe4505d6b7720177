package server

import (
	"cmp"
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

// auditLog is this server's audit log.
type auditLog struct{ *audit.Log }

// newAuditLog returns the log in the server's state directory.
func newAuditLog(config Config, server string, key ca.ClusterKey, log *slog.Logger) (auditLog, error) {
	secret, err := key.Derive("audit")
	if err != nil {
		return auditLog{}, fmt.Errorf("open the audit log: %w", err)
	}
	return auditLog{audit.New(audit.Config{
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
