// Package http2 carries exchanges of package l7 over HTTP/2 (RFC 9113, RFC
// 8441): [Server] is a serving end, [Pool] a forwarding one. They are made for a proxy: a connection has one
// goroutine that reads, one that writes while there is something to write, and
// none per stream unless the other end blocks; frames of all streams that are
// ready go out in one system call; and nothing is allocated per stream once its
// memory has come back from an earlier one. An idle connection holds no buffer
// and no stream.
//
// A peer may make us hold and do only so much: [Limits] has the bounds, each with
// an error of its own and a counter in [Counters]. DESIGN.md has the reasons.
//
// # The core
//
// Inside, conn is what both ends share. An end implements role, which the reader tells of
// heads, GOAWAY and time, and for each stream an owner, which the writer asks for
// what is to be sent:
//
//   - A forwarding end makes its stream with stream.begin and puts it on the
//     writer's list with stream.Wake. The writer calls owner.sendHead, which takes
//     the next number with conn.open and appends the head between conn.beginHead and
//     conn.endHead; then owner.next until io.EOF, and owner.trailers. owner.over is
//     the writer's last word.
//   - A serving end calls conn.open in role.head, and goes the same way.
//   - What comes: role.head for HEADERS; data is queued in the stream, whose Next,
//     Trailers and Cancel are an l7.Body; the stream's end is put there by the
//     reader, or with trailers by role.head through conn.end. stream.expect is the
//     declared length, which the core checks.
//   - conn.kill ends a stream early, with or without RST_STREAM, from any
//     goroutine; owner.killed hears of it. The peer's RST_STREAM and the end of the
//     connection come that way too.
//   - conn.detach is the end of a stream, once over was called and its consumer is
//     done; owner.recycle is told when nobody has it any more.
package http2
