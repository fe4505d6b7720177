// Package hpack is the field compression of HTTP/2 (RFC 7541), made for a
// proxy: once its tables and the caller's arena have grown, neither direction
// allocates, and what a table entry was found to be (its [http1.Known] index,
// whether its bytes are valid) is kept with the entry instead of being found
// again for each request.
//
// [Decoder] takes whole header blocks. It is strict: every malformed block is
// an [ErrCompression], after which the connection must end. A list that is too
// long is not: the decoder stops to materialize it, keeps its table right, and
// says [ErrListTooLarge], so that only the stream is refused. A block that
// expands without bound costs what its own bytes cost to walk over.
//
// [Encoder] indexes what repeats: a field enters the dynamic table when it is
// seen a second time while its trace is still there. So paths with ids, trace
// ids and dates of an idle service do not push out what pays, and no list of names
// has to know in advance which those are. Credentials never enter it, nor what
// came marked as never to be indexed.
package hpack
