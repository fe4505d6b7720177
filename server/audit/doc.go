// Package audit keeps the account of a server: who asked for what, and what became
// of it, one line of JSON per record, in files that nobody can change unnoticed.
//
// Each line names the SHA-256 of the line before, over the borders of files, so an
// edited, removed, inserted or moved line breaks the chain at a known place. A
// chain alone could be computed anew by whoever can write the files; so each line
// also carries an HMAC under a subkey of the cluster key. What remains possible is
// to cut off the end: that shows only against something outside of the files, such
// as a sequence number that was read or scraped before.
//
// A write of the API reserves a place in a bounded queue before it begins and is
// refused if there is none, or if the files can't be written: no change goes
// unaccounted for because the disk is slow or full. Records reach the operating
// system at once and the disk within SyncDelay: a killed server loses none, a
// machine that loses power loses the last SyncDelay.
package audit
