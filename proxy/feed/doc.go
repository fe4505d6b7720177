// Package feed carries the plan of a proxy from the agent of its host to mesh-proxy, and the proxy's state back, over a unix
// socket. The agent is the Server, mesh-proxy the Client.
//
// Plan, keys and listening sockets travel apart: a plan in parts of which only the changed ones are sent, private keys never
// in it, sockets as descriptors (SCM_RIGHTS), so that neither side of a restart loses a connection that waits to be accepted.
// What is sent is always the newest: at most one plan is under way to a proxy, and what changed meanwhile is sent as one step
// once it answered. A plan that the proxy refuses leaves the last good one in force there, and the reason in the status here.
//
// Several proxies can be fed, told apart by ID, and several processes of one ID at once, told apart by session: during a hot
// restart the old one is draining and still gets every plan, because it has to enforce it.
//
// The client keeps the last plan that was taken, and the keys, in a DiskCache, and boots from it when there is no agent.
//
// The agent may ask a proxy what it sees, see Server.Ask. The answers travel beside the plan, and never hold it up: the agent reads
// them as they come, and the proxy drops what does not fit.
//
// # Wire
//
// A frame is its length (4 bytes, big-endian, at most MaxFrame) and one JSON object with exactly one member, see Frame.
// Unknown members are ignored. Descriptors ride on the frame of kind "sockets" that names them, in its order.
package feed
