package l7_test

import (
	"io"
	"net/http"
	"testing"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// lengthAndTrailers is what HTTP/2 may have, and HTTP/1.1 has no framing for: a body of declared length with trailers behind it.
type lengthAndTrailers struct{ head l7.ResponseHead }

func (l *lengthAndTrailers) Head(l7.Waker) (*l7.ResponseHead, error) {
	l.head = l7.ResponseHead{Status: 200, Length: 3}
	l.head.Fields.Add([]byte("trailer"), []byte("x-sum"))
	return &l.head, nil
}

func (*lengthAndTrailers) Next(int, l7.Waker) ([]byte, error) { return []byte("abc"), io.EOF }

func (*lengthAndTrailers) Trailers() (f http1.Fields) {
	f.Add([]byte("x-sum"), []byte("42"))
	return f
}
func (*lengthAndTrailers) Blocking() bool   { return false }
func (*lengthAndTrailers) Cancel(l7.Reason) {}
func (*lengthAndTrailers) Close()           {}

// TestTrailersBehindLength: announced trailers are not lost because the body's length is known.
func TestTrailersBehindLength(t *testing.T) {
	p := start(t, options{handler: func(*proxy) l7.Handler {
		return handler(func(*l7.Exchange) l7.Response { return &lengthAndTrailers{} })
	}})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.addr+"/", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := httpClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // the end of it
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "abc" || resp.Trailer.Get("X-Sum") != "42" {
		t.Errorf("got %q, %v with trailers %v", body, err, resp.Trailer)
	}
}
