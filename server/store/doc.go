// Package store holds the contract between meshd and the place where its
// cluster state lives: a small transactional key space, [Engine].
//
// The contract asks for what etcd, Consul's KV and a Raft group can all give:
// compare-and-set transactions of bounded size, watches that yield whole
// transactions coalesced to the newest values, a barrier for linearizable
// reads, and one elected leader. It is not a replicated log: no caller may rely
// on seeing every version of a key.
//
// The package also provides the machine that the engines of this project are
// made of ([Space], deterministic and free of I/O), an engine in memory
// ([Memory]), and what works through the contract on every engine: [Replace],
// [Export] and [Import].
package store
