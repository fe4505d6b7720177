// Package backup writes the whole state of a cluster to files and restores it.
//
// A file is a magic line, a header in plain JSON, the state in encrypted chunks,
// and the SHA-256 of everything before it. Whoever has a file and not the
// cluster key learns the header and the size. The chunks are the STREAM
// construction (Hoang, Reyhanitabar, Rogaway, Vizár: "Online
// Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", 2015) over
// AES-256-GCM: the nonce counts the chunks and marks the last one, so chunks
// can't be changed, left out, moved, repeated or cut off without notice. Each
// file has a key of its own, derived from the cluster key, a random salt and the
// header, so a changed header is noticed too.
package backup
