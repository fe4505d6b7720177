package meshpb

import (
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason is why a server refused a call, for programs: one cause per refusal.
// The message of the gRPC status says the same to people.
type Reason string

// The reasons. The first group is that of Join.
const (
	ReasonTokenUnknown Reason = "TOKEN_UNKNOWN"    // no such token: mistyped, deleted, or of another cluster
	ReasonTokenUsed    Reason = "TOKEN_USED"       // by another key
	ReasonTokenExpired Reason = "TOKEN_EXPIRED"    //
	ReasonTokenNode    Reason = "TOKEN_OTHER_NODE" // made for another node name
	ReasonClock        Reason = "CLOCK_OFF"        // the server's clock is before the token's creation
	ReasonNameInUse    Reason = "NAME_IN_USE"      // another machine joined under this name

	ReasonNoIdentity    Reason = "NO_IDENTITY"   // no node certificate was presented
	ReasonNodeUnknown   Reason = "NODE_UNKNOWN"  // the node's record was deleted
	ReasonNodeReplaced  Reason = "NODE_REPLACED" // another machine has taken over the name
	ReasonNotPermitted  Reason = "NOT_PERMITTED" // the node's record does not allow the service
	ReasonNotRegistered Reason = "NOT_REGISTERED"
	ReasonBadRequest    Reason = "BAD_REQUEST"
	ReasonTooMany       Reason = "TOO_MANY" // slow down
	ReasonSuperseded    Reason = "SUPERSEDED"
	ReasonSilent        Reason = "SILENT" // no heartbeat for a whole lease
	ReasonLeft          Reason = "LEFT"
	ReasonStopping      Reason = "STOPPING"
	ReasonNoQuorum      Reason = "NO_QUORUM" // the server does not reach a majority of the servers
	ReasonStore         Reason = "STORE"     // the store refused or could not be reached
)

// reasonDomain marks our own details among those of other software.
const reasonDomain = "meshd"

// serverTime is the key of the server's clock in the details of a refusal.
const serverTime = "server_time"

// Refuse returns a gRPC status error with a reason, and with the server's clock
// so that the caller can tell when its own is off.
func Refuse(code codes.Code, reason Reason, message string, now time.Time) error {
	s := status.New(code, message)
	detailed, err := s.WithDetails(&errdetails.ErrorInfo{
		Reason: string(reason), Domain: reasonDomain,
		Metadata: map[string]string{serverTime: now.UTC().Format(time.RFC3339Nano)},
	})
	if err != nil {
		return s.Err()
	}
	return detailed.Err()
}

// ReasonOf returns the reason in an error of a call, "" if it carries none, and
// the server's time then, zero if it is not told.
func ReasonOf(err error) (Reason, time.Time) {
	for _, detail := range status.Convert(err).Details() {
		info, ok := detail.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != reasonDomain {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, info.GetMetadata()[serverTime])
		if err != nil {
			at = time.Time{}
		}
		return Reason(info.GetReason()), at
	}
	return "", time.Time{}
}
