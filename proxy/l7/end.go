package l7

import (
	"log/slog"
	"time"

	"github.com/meshd/meshd/proxy/http1"
)

// What serving and forwarding ends outside this package need to do as those in it do: the same exchange comes out, whatever it
// arrived over.

// Instant is a monotonic clock in nanoseconds from some moment of this process. It is never 0.
func Instant() int64 { return instant() + 1 }

// At returns the time of an Instant.
func At(i int64) time.Time { return epoch.Add(time.Duration(i)) }

// Begin makes ex a new exchange for a request whose head was read, and forgets all of the last one but memory. head.Scheme is set
// from info. began is the Instant of its first byte. head's fields must have none that belongs to a connection. [Exchange.Normalize]
// comes next.
func (ex *Exchange) Begin(info *ConnInfo, client interface{ Gone() bool }, head *Head, began int64) {
	ex.Clear()
	ex.Conn, ex.Client, ex.Request = info, client, *head
	ex.progress.Store(began)
	ex.Request.Scheme = httpScheme
	if info.Scheme == "https" {
		ex.Request.Scheme = httpsScheme
	}
	ex.Record = Record{Source: info.Source, Rule: -1, Start: At(began), Method: head.Method, Path: head.Path}
}

// Clear drops every reference that ex has.
func (ex *Exchange) Clear() {
	text := ex.reply.text
	*ex = Exchange{}
	ex.reply.text = text[:0]
}

// Normalize brings the request to the one form that policy sees and that is forwarded: path and authority normalized, nothing that
// only this mesh may say but xfcc, which is nil for none. An error is to be answered with [Exchange.Fail].
func (ex *Exchange) Normalize(host, xfcc []byte) *Error {
	fields := ex.Request.Fields
	kept := fields[:0]
	for i := range fields {
		if id := fields[i].ID; id != http1.ForwardedClientCert && id != http1.MeshHeader {
			kept = append(kept, fields[i])
		}
	}
	if xfcc != nil {
		kept = append(kept, http1.Field{Name: nameXFCC, Value: xfcc, ID: http1.ForwardedClientCert})
	}
	ex.Request.Fields = kept
	return ex.Request.normalize(host, ex.Conn.Authority)
}

// Moved says that bytes of the exchange moved, in either direction.
func (ex *Exchange) Moved() { ex.progress.Store(Instant()) }

// Silent returns for how long none did.
func (ex *Exchange) Silent() time.Duration { return time.Duration(Instant() - ex.progress.Load()) }

// Own reports that head is one that [Exchange.Fail] made for ex.
func (ex *Exchange) Own(head *ResponseHead) bool { return head == &ex.reply.head }

// Outcome is how an exchange ended, for its record.
type Outcome struct {
	Status        int   // that was sent, 0 for none
	RequestBytes  int64 // of body
	ResponseBytes int64
	Failed        *Error // nil if it went well
}

// Tell completes the exchange's record and gives it to the sink. It must be called once, after the response's Close.
func (ex *Exchange) Tell(cfg *ServerConfig, o *Outcome) {
	r := &ex.Record
	r.Authority = ex.Request.Authority
	r.Path = ex.Request.Path
	r.Status = o.Status
	r.Duration = time.Duration(instant() - int64(r.Start.Sub(epoch)))
	r.RequestBytes, r.ResponseBytes = o.RequestBytes, o.ResponseBytes
	if o.Failed != nil {
		r.Reason, r.Err = o.Failed.Reason, o.Failed
	}
	if log := cfg.Log; r.Reason == Internal && log != nil {
		log.Error("an exchange failed by a fault of this proxy",
			slog.String("error_id", r.ErrorID), slog.String("source", r.Source.String()), slog.Any("error", r.Err))
	}
	if sink := cfg.Sink; sink != nil {
		sink(r)
	}
}

// AsError returns err as what bodies and responses fail with: an *Error as it is, and any other as [Internal].
func AsError(err error) *Error { return asError(err) }

// WithDefaults returns cfg with its zero values filled.
func (cfg ServerConfig) WithDefaults() ServerConfig { //nolint:gocritic // made once per listener
	cfg.HeadTimeout = orDefault(cfg.HeadTimeout, 10*time.Second)
	cfg.IdleTimeout = orDefault(cfg.IdleTimeout, 5*time.Minute)
	cfg.StreamIdle = orDefault(cfg.StreamIdle, 5*time.Minute)
	cfg.BodyGrace = orDefault(cfg.BodyGrace, 10*time.Second)
	cfg.Limits = cfg.Limits.WithDefaults()
	return cfg
}
