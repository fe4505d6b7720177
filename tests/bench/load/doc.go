// Package load is both ends of a benchmark: a client that loads a server and
// measures, and the server behind what is measured. Each is one thread that
// waits in epoll, so that of a small machine as much as possible is left for
// what lies in between. Both are for processes of their own: they block their
// thread in system calls that the runtime does not know of.
package load
