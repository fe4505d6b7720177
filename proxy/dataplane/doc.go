// Package dataplane moves the bytes: it accepts connections on the listeners of a plan, proves identities with mutual TLS,
// asks the intentions, and carries TCP and HTTP between applications and the mesh.
//
// A Plane runs one plan at a time behind one atomic pointer, see Plane.Apply. What lives longer than a plan (pools,
// outstanding requests, connections) is kept apart and handed on where the next plan leaves it alone. DESIGN.md beside this
// file tells the life of a connection, what happens to it when a plan changes, and what was refused.
package dataplane
