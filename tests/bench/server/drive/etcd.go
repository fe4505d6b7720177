package drive

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// etcdWriter is a gRPC client of etcd's KV service. It writes etcd's messages
// itself: it costs less than etcd's own client, which is to etcd's advantage.
type etcdWriter struct{ conn *grpc.ClientConn }

var (
	errCompare = errors.New("the key has another revision")
	errMessage = errors.New("malformed answer")
)

func newEtcd(address, roots string) (Writer, error) {
	config, err := tlsConfig(roots)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(plainCodec{})))
	if err != nil {
		return nil, err
	}
	return &etcdWriter{conn: conn}, nil
}

// Write implements Writer.
func (w *etcdWriter) Write(ctx context.Context, key string, value []byte, expect uint64) (uint64, error) {
	var answer []byte
	if err := w.conn.Invoke(ctx, "/etcdserverpb.KV/Txn", compareAndSet(key, value, expect), &answer); err != nil {
		return 0, err
	}
	return txnRevision(answer)
}

// Close implements Writer.
func (w *etcdWriter) Close() { _ = w.conn.Close() } // nothing is waited for any more

// Numbers of the fields of etcd's rpc.proto.
const (
	txnCompare, txnSuccess                        = 1, 2
	compareTarget, compareKey, compareRevision    = 2, 3, 6
	compareByRevision                             = 2 // Compare.MOD
	opPut, putKey, putValue                       = 2, 1, 2
	answerHeader, answerSucceeded, headerPosition = 1, 2, 3
)

// compareAndSet is etcd's TxnRequest: if the key was last modified at the
// expected revision, put.
func compareAndSet(key string, value []byte, expect uint64) []byte {
	var compare, put, op, out []byte
	compare = protowire.AppendVarint(protowire.AppendTag(compare, compareTarget, protowire.VarintType), compareByRevision)
	compare = protowire.AppendString(protowire.AppendTag(compare, compareKey, protowire.BytesType), key)
	compare = protowire.AppendVarint(protowire.AppendTag(compare, compareRevision, protowire.VarintType), expect)
	put = protowire.AppendString(protowire.AppendTag(put, putKey, protowire.BytesType), key)
	put = protowire.AppendBytes(protowire.AppendTag(put, putValue, protowire.BytesType), value)
	op = protowire.AppendBytes(protowire.AppendTag(op, opPut, protowire.BytesType), put)
	out = protowire.AppendBytes(protowire.AppendTag(out, txnCompare, protowire.BytesType), compare)
	return protowire.AppendBytes(protowire.AppendTag(out, txnSuccess, protowire.BytesType), op)
}

// txnRevision reads the new revision from a TxnResponse.
func txnRevision(answer []byte) (uint64, error) {
	var header []byte
	succeeded, revision := uint64(0), uint64(0)
	if err := fields(answer, func(number protowire.Number, value uint64, body []byte) {
		switch number {
		case answerHeader:
			header = body
		case answerSucceeded:
			succeeded = value
		default:
		}
	}); err != nil {
		return 0, err
	}
	if succeeded != 1 {
		return 0, errCompare
	}
	err := fields(header, func(number protowire.Number, value uint64, _ []byte) {
		if number == headerPosition {
			revision = value
		}
	})
	return revision, err
}

// fields yields the fields of a message that are numbers or bytes.
func fields(message []byte, yield func(number protowire.Number, value uint64, body []byte)) error {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return fmt.Errorf("%w: %w", errMessage, protowire.ParseError(n))
		}
		message = message[n:]
		value, body := uint64(0), []byte(nil)
		switch kind {
		case protowire.VarintType:
			value, n = protowire.ConsumeVarint(message)
		case protowire.BytesType:
			body, n = protowire.ConsumeBytes(message)
		default:
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return fmt.Errorf("%w: %w", errMessage, protowire.ParseError(n))
		}
		message = message[n:]
		yield(number, value, body)
	}
	return nil
}

// plainCodec passes bytes on: they are messages already.
type plainCodec struct{}

// Marshal implements encoding.CodecV2.
func (plainCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("send a %T: %w", v, errMessage)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (plainCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("receive a %T: %w", v, errMessage)
	}
	*b = data.Materialize()
	return nil
}

// Name implements encoding.CodecV2.
func (plainCodec) Name() string { return "proto" }
