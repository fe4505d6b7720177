package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"
	"time"

	"github.com/meshd/meshd/catalog"
)

const (
	// watchSilence is after how long without a line a watch counts as broken;
	// servers send one every 15 s.
	watchSilence = 45 * time.Second
	// maxEvent bounds one line of a watch.
	maxEvent = 4 << 20
)

var errEvent = errors.New("malformed event")

// Watch yields the selected resources of a kind and then their changes, until
// ctx ends, the caller stops, or the connection breaks, which is the last
// error. To go on, watch again: the first event is a reset.
func (c *Client) Watch(ctx context.Context, kind Kind, sel Selection) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		alarm := time.AfterFunc(watchSilence, cancel)
		defer alarm.Stop()
		q := sel.query()
		q.Set("watch", "true")
		resp, err := c.send(ctx, http.MethodGet, "/v1/"+kind.Collection()+"?"+q.Encode(), "", nil)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer resp.Body.Close() //nolint:errcheck // whoever stops reading needs no more
		for event, err := range readStream(resp.Body, func() { alarm.Reset(watchSilence) }, decodeEvent) {
			if err != nil && CodeOf(err) == "" && !errors.Is(err, errEvent) {
				err = &Error{Code: CodeUnreachable, cause: err, Message: "the watch broke: " + rootText(err), Next: "watch again"}
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// readStream reads server-sent events, and calls alive at every line. The last
// thing it yields is an error: io.ErrUnexpectedEOF when the stream just ends, as
// a watch has no end of its own.
func readStream[T any](r io.Reader, alive func(), decode func(name, data string) (T, bool, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxEvent)
		name, data := "", ""
		for lines.Scan() {
			alive()
			field, value, _ := strings.Cut(lines.Text(), ":")
			value = strings.TrimPrefix(value, " ")
			switch {
			case lines.Text() == "" && data != "":
				event, known, err := decode(name, data)
				if name, data = "", ""; !known {
					continue // of a newer server
				}
				if !yield(event, err) || err != nil {
					return
				}
			case field == "event":
				name = value
			case field == "data":
				data = value // this API's events have one line of data
			}
		}
		err := lines.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		var none T
		yield(none, err)
	}
}

func decodeEvent(name, data string) (e Event, known bool, err error) {
	e.Type = name
	switch name {
	case EventReset, EventPosition:
		var at struct {
			Position catalog.Position `json:"position"`
		}
		err = json.Unmarshal([]byte(data), &at)
		e.Position = at.Position
	case EventPut, EventDelete:
		err = json.Unmarshal([]byte(data), &e.Item)
	case EventError:
		var refusal Error
		if err = json.Unmarshal([]byte(data), &refusal); err == nil {
			return e, true, &refusal
		}
	default:
		return e, false, nil
	}
	if err != nil {
		return e, true, fmt.Errorf("%w %q: %w", errEvent, name, err)
	}
	return e, true, nil
}
