package main_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// host stands in for a host's agent: host SOCKET FOLDER. It answers with the files
// of the folder: denials.json, explain-ID.json, and as events, one a line, tap.json
// and top.json. A stream stays open until its reader goes.
func host(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: host SOCKET FOLDER")
	}
	folder := ts.MkAbs(args[1])
	mux := http.NewServeMux()
	file := func(w http.ResponseWriter, name string) {
		data, err := os.ReadFile(filepath.Join(folder, filepath.Base(name)))
		if err != nil {
			w.WriteHeader(http.StatusNotFound)
			_, _ = fmt.Fprint(w, `{"error":{"code":"not_found","message":"no proxy remembers it"}}`)
			return
		}
		_, _ = w.Write(data)
	}
	stream := func(name string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			lines, err := os.Open(filepath.Join(folder, name))
			if err != nil {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			defer func() { _ = lines.Close() }()
			w.Header().Set("Content-Type", "text/event-stream")
			for all := bufio.NewScanner(lines); all.Scan(); {
				_, _ = fmt.Fprintf(w, "event: answer\ndata: %s\n\n", all.Text())
			}
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	}
	mux.HandleFunc("GET /v1/denials", func(w http.ResponseWriter, _ *http.Request) { file(w, "denials.json") })
	mux.HandleFunc("GET /v1/explain/{id}", func(w http.ResponseWriter, r *http.Request) { file(w, "explain-"+r.PathValue("id")+".json") })
	mux.HandleFunc("GET /v1/tap", stream("tap.json"))
	mux.HandleFunc("GET /v1/top", stream("top.json"))
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", ts.MkAbs(args[0]))
	ts.Check(err)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // it ends with Close
	}()
	ts.Defer(func() {
		_ = srv.Close()
		<-done
	})
}
