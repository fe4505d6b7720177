// Package peer connects the servers of a cluster: one port, on which they admit
// each other by the cluster key, for Raft and for what servers ask of each other.
// It brings a new server into its cluster, or founds that.
//
// DESIGN.md has the reasons, and the argument that two clusters can't be founded.
package peer
