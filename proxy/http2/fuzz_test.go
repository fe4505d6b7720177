package http2_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// FuzzServe sends any bytes behind the preface: nothing panics, the connection
// ends when its client does, and each exchange is told of once.
func FuzzServe(f *testing.F) {
	seed := func(build func(r *xhttp2.Framer)) {
		var b fuzzBytes
		build(xhttp2.NewFramer(&b, nil))
		f.Add([]byte(b))
	}
	get := []byte{0x82, 0x84, 0x86, 0x41, 1, 'a'}
	seed(func(r *xhttp2.Framer) {
		_ = r.WriteSettings()
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: get, EndHeaders: true, EndStream: true})
	})
	seed(func(r *xhttp2.Framer) {
		_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1})
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: get[:2], PadLength: 3})
		_ = r.WriteContinuation(1, true, get[2:])
		_ = r.WriteDataPadded(1, false, []byte("abc"), []byte{0})
		_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 3, BlockFragment: get, EndHeaders: true})
		_ = r.WriteRSTStream(3, xhttp2.ErrCodeCancel)
		_ = r.WriteWindowUpdate(1, 100)
		_ = r.WriteData(1, true, []byte("def"))
		_ = r.WritePing(false, [8]byte{1})
		_ = r.WritePriority(5, xhttp2.PriorityParam{StreamDep: 1})
		_ = r.WriteGoAway(1, xhttp2.ErrCodeNo, nil)
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		handled, told := 0, 0
		cfg := http2.ServerConfig{}
		cfg.Sink = func(*l7.Record) { told++ }
		cfg.Handler = handler(func(ex *l7.Exchange) l7.Response {
			handled++
			return echoHead(ex)
		})
		client, server := net.Pipe()
		done, read := make(chan error, 1), make(chan error, 1)
		go func() { done <- http2.NewServer(cfg).NewConn(server, l7.ConnInfo{Authority: "a"}).Serve(t.Context()) }()
		go func() {
			_, err := io.Copy(io.Discard, client)
			read <- err
		}()
		if err := client.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(client, xhttp2.ClientPreface)
		if _, err := client.Write(b); err != nil {
			t.Logf("the connection ended before: %v", err)
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if err := <-read; err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
		select {
		case err := <-done:
			t.Logf("it ended: %v", err)
		case <-time.After(10 * time.Second):
			t.Fatal("the connection did not end with its client")
		}
		if handled > told {
			t.Errorf("%d exchanges, %d records", handled, told)
		}
	})
}

type fuzzBytes []byte

func (b *fuzzBytes) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}
