package server

import (
	"context"
	"crypto/x509"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/meshpb"
)

// agentCalls accounts for what agents are given for ever: a host's admission,
// certificates, and that a host has left. What they register is in the catalog's
// history, and is not recorded here.
type agentCalls struct{ audit auditLog }

// unary is a grpc.UnaryServerInterceptor.
func (a agentCalls) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	what, ok := a.describe(ctx, req)
	if !ok {
		return next(ctx, req)
	}
	keep, err := a.audit.reserve()
	if err != nil {
		// Without certificates the mesh would end with the log's disk. That they were
		// signed is counted then, as suppressed.
		if what.Resource != acl.Sign {
			return nil, meshpb.Refuse(codes.Unavailable, meshpb.ReasonStore, err.Error(), time.Now())
		}
		keep = a.audit.note
	}
	what.Time, what.Method, what.Route = time.Now().UTC(), "gRPC", info.FullMethod
	answer, err := next(ctx, req)
	what.Outcome, what.Changes = api.OutcomeAllowed, given(answer)
	if err != nil {
		what.Outcome = api.OutcomeFailed
		reason, _ := meshpb.ReasonOf(err)
		what.Code, what.Changes = client.Code(reason), nil
		switch status.Code(err) { //nolint:exhaustive // every other one is a failure
		case codes.PermissionDenied, codes.Unauthenticated, codes.AlreadyExists:
			what.Outcome = api.OutcomeDenied
		}
	}
	keep(what)
	return answer, err
}

// describe tells what a call asks for, and false of calls that are not recorded.
// What is no name of the grammar is left out: it may be anything.
func (a agentCalls) describe(ctx context.Context, req any) (api.AuditRecord, bool) {
	rec := api.AuditRecord{Who: "anonymous", Verb: acl.Write}
	if p, ok := peer.FromContext(ctx); ok {
		rec.Who, rec.Remote = agentOf(p)
	}
	switch req := req.(type) {
	case *meshpb.JoinRequest:
		rec.Resource = acl.Join
		if catalog.CheckLabel(req.GetNode()) == nil {
			rec.Name = req.GetNode()
		}
	case *meshpb.SignRequest:
		rec.Resource = acl.Sign
		if id, err := spiffe.Parse(req.GetId()); err == nil {
			rec.Namespace, rec.Name = id.Namespace, id.Name
		}
	case *meshpb.LeaveRequest:
		rec.Resource, rec.Name = acl.Leave, strings.TrimPrefix(rec.Who, "node:")
	default:
		return rec, false
	}
	return rec, true
}

// agentOf is who calls, by the certificate that the handshake has verified, and
// from which host.
func agentOf(p *peer.Peer) (who, remote string) {
	who = "anonymous"
	if host, _, err := net.SplitHostPort(p.Addr.String()); err == nil {
		remote = host
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return who, remote
	}
	if id, err := spiffe.FromCert(info.State.PeerCertificates[0]); err == nil {
		who = id.Kind.String() + ":" + id.Name
	}
	return who, remote
}

// given names the certificate in an answer: whose it is, by its serial number, as
// revocation and other logs know it.
func given(answer any) []api.AuditChange {
	carrier, ok := answer.(interface{ GetChain() [][]byte })
	if !ok || len(carrier.GetChain()) == 0 {
		return nil
	}
	leaf, err := x509.ParseCertificate(carrier.GetChain()[0])
	if err != nil || len(leaf.URIs) == 0 {
		return nil
	}
	return []api.AuditChange{{Kind: "certificate", Name: leaf.URIs[0].String() + " serial " + leaf.SerialNumber.Text(16), Change: "signed"}}
}
