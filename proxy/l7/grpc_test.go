package l7_test

import (
	"strings"
	"testing"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// TestFailToGRPC: an error of our own is a status in a head without anything behind it, for who asked by gRPC.
func TestFailToGRPC(t *testing.T) {
	field := func(name, value string) http1.Field {
		return http1.Field{Name: []byte(name), Value: []byte(value), ID: http1.ContentType}
	}
	tests := map[string]struct {
		content string
		err     l7.Error
		status  int
		code    string
	}{
		"denied":         {"application/grpc", l7.Error{Reason: l7.Denied}, 200, "7"},
		"no instance":    {"application/grpc+proto", l7.Error{Reason: l7.NoHealthyInstance}, 200, "14"},
		"timeout":        {"application/grpc-web", l7.Error{Reason: l7.Timeout}, 200, "4"},
		"not for others": {"application/json", l7.Error{Reason: l7.Timeout}, 504, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.err.Detail = "50 %\nü"
			var ex l7.Exchange
			ex.Request.Fields = http1.Fields{field("content-type", tt.content)}
			resp := ex.Fail(&tt.err)
			head, err := resp.Head(nil)
			if err != nil || head.Status != tt.status {
				t.Fatalf("the head is %+v, %v", head, err)
			}
			code, _ := head.Fields.Value("grpc-status", 0)
			message, _ := head.Fields.Value("grpc-message", 0)
			reason, _ := head.Fields.Value(l7.FieldError, 0)
			if string(code) != tt.code || string(reason) != tt.err.Reason.String() {
				t.Errorf("status %q, reason %q; want %q, %q", code, reason, tt.code, tt.err.Reason)
			}
			if tt.code == "" {
				return
			}
			if !head.NoBody || head.Length != 0 {
				t.Errorf("a body follows: %+v", head)
			}
			if !strings.HasPrefix(string(message), tt.err.Reason.String()+": ") || !strings.HasSuffix(string(message), "(50 %25%0A%C3%BC)") {
				t.Errorf("the message is %q", message)
			}
		})
	}
}
