// Package state holds what the servers know as typed tables over a
// [store.Engine]: who is in the mesh, who may talk to whom, who is alive.
//
// Reading goes through an immutable [Snapshot], which is decoded once per change
// and shared by all readers; writing goes through [State.Update], which is a
// compare-and-set transaction on what it read. There is one place per kind of
// record, its [Table]: name, key, decoding.
//
// Bytes that a user wrote are stored and handed on as they are; only the machine's
// own kinds (leases, health, tokens) are encoded here.
package state
