// Package check runs the health checks of a host's instances: http, tcp and
// ttl, with the meaning that Consul gives them.
//
// A check is critical until its first result. Runs are spread: the first one
// comes at a random moment of the first interval. A result becomes a verdict
// only after the number of equal results that the check asks for, and only a
// change of verdict is worth telling anyone: output stays on the host.
//
// Beside the checks it watches the ports themselves: an application that listened
// and listens no more has ended, which shows at once and needs no check. Where it
// was never seen to listen, in another network namespace for instance, nothing is
// concluded.
//
// A check cannot be turned into a way to read what only this host may reach:
// redirects are not followed, addresses where cloud metadata lives are refused
// after resolution, the address that was judged is the one that is dialed, and
// at most 4 KiB of an answer are kept.
package check
