package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/state"
)

// renewInterval is how often the leader looks whether the CA's intermediate is
// due; it is replaced at half of its life of a year.
const renewInterval = time.Hour

var errNoAuthority = errors.New("the certificate authority is not open yet")

// authority signs with what the state says now. It implements ca.Authority.
type authority struct {
	config Config
	state  *state.State
	key    ca.ClusterKey
	log    *slog.Logger
	now    atomic.Pointer[opened]
}

type opened struct {
	signer *builtin.Authority
	bundle ca.Bundle
	raw    string
}

var _ ca.Authority = (*authority)(nil)

func newAuthority(config Config, st *state.State, key ca.ClusterKey, log *slog.Logger) *authority {
	return &authority{config: config, state: st, key: key, log: log}
}

// Sign implements ca.Authority.
func (a *authority) Sign(ctx context.Context, req ca.SignRequest) (ca.Chain, error) {
	o := a.now.Load()
	if o == nil {
		return nil, errNoAuthority
	}
	fault.Point(fault.CASignBefore)
	chain, err := o.signer.Sign(ctx, req)
	fault.Point(fault.CASignAfter)
	return chain, err //nolint:wrapcheck // the authority's own words
}

// Roots implements ca.Authority.
func (a *authority) Roots(context.Context) (ca.Bundle, error) {
	o := a.now.Load()
	if o == nil {
		return ca.Bundle{}, errNoAuthority
	}
	return o.bundle, nil
}

// Bundle is Roots without an error: the zero Bundle trusts nobody.
func (a *authority) Bundle() ca.Bundle {
	if o := a.now.Load(); o != nil {
		return o.bundle
	}
	return ca.Bundle{}
}

// signer opens a stored CA, which must be of this trust domain and wrapped under
// this cluster's key.
func (a *authority) signer(record state.Record[json.RawMessage]) (*builtin.Authority, error) {
	stored, err := decodeAuthority(record)
	if err != nil {
		return nil, err
	}
	if stored.TrustDomain != a.config.TrustDomain {
		return nil, fmt.Errorf("open the CA: %w: it is that of %q, and trust_domain is %q", ErrTrustDomain, stored.TrustDomain, a.config.TrustDomain)
	}
	signer, err := builtin.Open(stored, a.key, a.config.CA.builtin())
	if err != nil {
		return nil, fmt.Errorf("open the CA; is cluster_key_file that of this cluster? %w", err)
	}
	return signer, nil
}

// open takes over what the snapshot says, if it says something new.
func (a *authority) open(snapshot *state.Snapshot) error {
	record, ok := state.Authorities.Get(snapshot, ProviderBuiltin)
	if !ok {
		return fmt.Errorf("open the CA: %w: the store has none", builtin.ErrState)
	}
	if o := a.now.Load(); o != nil && o.raw == string(record.Raw) {
		return nil
	}
	signer, err := a.signer(record)
	if err != nil {
		return err
	}
	bundle, err := signer.Roots(context.Background())
	if err != nil {
		return fmt.Errorf("open the CA: %w", err)
	}
	a.now.Store(&opened{signer: signer, bundle: bundle, raw: string(record.Raw)})
	return nil
}

func decodeAuthority(record state.Record[json.RawMessage]) (builtin.State, error) {
	var stored builtin.State
	if err := errors.Join(record.Err, json.Unmarshal(record.Raw, &stored)); err != nil {
		return stored, fmt.Errorf("decode the CA: %w", err)
	}
	return stored, nil
}

// run follows the state until ctx ends. A CA that can't be opened leaves the
// last one in force.
func (a *authority) run(ctx context.Context) error {
	failed := ""
	for {
		snapshot := a.state.Snapshot()
		if err := a.open(snapshot); err != nil && err.Error() != failed { //nolint:contextcheck // opening does no I/O
			failed = err.Error()
			a.log.ErrorContext(ctx, "the stored CA can't be used; signing goes on with the one before", slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.state.Changed(snapshot):
		}
	}
}

// renew keeps the intermediate fresh. It runs on the server that leads.
func (a *authority) renew(ctx context.Context) error {
	tick := time.NewTicker(renewInterval)
	defer tick.Stop()
	for {
		if err := a.renewOnce(ctx); err != nil && ctx.Err() == nil {
			a.log.WarnContext(ctx, "the CA's intermediate could not be renewed; trying again", slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *authority) renewOnce(ctx context.Context) error {
	_, err := a.state.Update(ctx, func(tx *state.Tx) error { //nolint:contextcheck // making a certificate does no I/O
		record, ok := state.Authorities.Get(tx, ProviderBuiltin)
		if !ok {
			return fmt.Errorf("renew the CA: %w: the store has none", builtin.ErrState)
		}
		stored, err := decodeAuthority(record)
		if err != nil {
			return err
		}
		renewed, due, err := builtin.Renew(stored, a.key, time.Now())
		if err != nil || !due {
			return err //nolint:wrapcheck // the authority's own words
		}
		raw, err := json.Marshal(renewed)
		if err != nil {
			return fmt.Errorf("renew the CA: encode it: %w", err)
		}
		return state.Authorities.PutRaw(tx, ProviderBuiltin, raw)
	})
	return err //nolint:wrapcheck // says what was done
}
