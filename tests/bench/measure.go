package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/bench/load"
)

// trial is one thing to measure of each contender.
type trial struct {
	Setting  setting  `json:"setting"`
	Scenario scenario `json:"scenario"`
	Load     string   `json:"load"`
	Body     string   `json:"body,omitempty"`
	// Call is what is called over HTTP/2, Slow that there are slow streams beside.
	Call string `json:"call,omitempty"`
	Slow bool   `json:"slow,omitempty"`
}

func (t trial) String() string {
	return strings.TrimSpace(strings.Join([]string{string(t.Setting), string(t.Scenario), t.Load, t.Body}, " "))
}

// trials are those of the options, in one setting.
func (o options) trials(s setting) []trial {
	var out []trial
	for _, sc := range []scenario{plain, mutual, stream, plain2, mutual2} {
		switch {
		case !slices.Contains(o.only, string(sc)):
			continue
		case sc == stream:
			out = append(out, trial{Setting: s, Scenario: sc, Load: saturation})
			continue
		case sc.http2():
			out = append(out, o.trials2(s, sc)...)
			continue
		}
		for _, l := range o.loads {
			for _, body := range o.bodies {
				if o.quick && (l == steady || sc == plain) && body != "100" && len(o.bodies) > 1 {
					continue
				}
				out = append(out, trial{Setting: s, Scenario: sc, Load: l, Body: body})
			}
		}
	}
	return out
}

// trials2 are those of HTTP/2: all calls at saturation, and small GETs at a
// constant rate with and without slow streams beside them.
func (o options) trials2(s setting, sc scenario) []trial {
	var out []trial
	if slices.Contains(o.loads, saturation) {
		for _, call := range o.calls {
			for _, body := range o.bodies {
				if (call == load.CallStreaming || o.quick) && body != "100" && len(o.bodies) > 1 {
					continue
				}
				out = append(out, trial{Setting: s, Scenario: sc, Load: saturation, Body: body, Call: call})
			}
		}
	}
	if slices.Contains(o.loads, steady) && slices.Contains(o.calls, load.CallGet) && !o.quick {
		t := trial{Setting: s, Scenario: sc, Load: steady, Body: "100", Call: load.CallGet}
		out = append(out, t)
		t.Slow = true
		out = append(out, t)
	}
	return out
}

// streams is on how many connections bytes are counted.
const streams = 8

// How many connections HTTP/2 has, of how many requests at once each; and how
// many slow streams besides, where there are any.
const (
	connections2 = 16
	streams2     = 8
	slow2        = 1
)

// job is the trial as the client gets it.
func (o options) job(t trial, l lane) load.Job {
	job := load.Job{
		Address: l.address, Path: load.SmallPath, Length: load.SmallLength, Connections: o.connections,
		Warmup: o.warmup, Window: o.window, Processes: l.processes(),
	}
	if t.Body == "10k" {
		job.Path, job.Length = load.LargePath, load.LargeLength
	}
	if t.Load == steady {
		job.Rate, job.Window = o.rate, o.paired
		if t.Scenario == mutual && t.Body == "100" {
			job.Window *= 2
		}
	}
	switch {
	case t.Scenario == stream:
		job.Path, job.Length, job.Connections = "", 0, streams
	case t.Call != "":
		job.Connections, job.Streams, job.Call = connections2, streams2, t.Call
	}
	if path := map[string]string{load.CallUnary: load.UnaryPath, load.CallStreaming: load.StreamingPath}[t.Call]; path != "" {
		job.Path, job.Length = path+job.Path, load.MessageLength(job.Length)
	}
	if t.Slow {
		job.Slow = slow2
	}
	return job
}

// client runs a job in a process of its own, on the CPUs of the ends.
func (f *field) client(ctx context.Context, job load.Job) (out load.Result, err error) {
	input, err := json.Marshal(job)
	if err != nil {
		return out, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, f.options.self, loadCommand)
	cmd.Env = append(os.Environ(), quiet()...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &stdout, &stderr
	_, ends := f.setting.cpus()
	if err := on(ends, cmd.Run); err != nil {
		return out, fmt.Errorf("%w %s", err, strings.TrimSpace(stderr.String()))
	}
	return out, json.Unmarshal(stdout.Bytes(), &out)
}

// rounds measures every trial of a setting in every round, each contender in
// turn. Each round begins with another one, so that none always follows the
// same, and slow changes of the machine meet all.
func (f *field) rounds(ctx context.Context, r *report) error {
	trials := f.options.trials(f.setting)
	if len(trials) == 0 {
		return nil
	}
	fmt.Fprintf(os.Stderr, "bench: %s, %d rounds, about %s\n", f.setting, f.options.rounds, f.estimate(trials).Round(time.Second))
	before, err := f.usage()
	if err != nil {
		return err
	}
	for round := range f.options.rounds {
		for _, t := range trials {
			var lanes []lane
			for _, l := range f.lanes {
				if l.scenario == t.Scenario {
					lanes = append(lanes, l)
				}
			}
			for i := range lanes {
				l := lanes[(i+round)%len(lanes)]
				out, err := f.client(ctx, f.options.job(t, l))
				switch {
				case ctx.Err() != nil:
					return ctx.Err()
				case err != nil && t.Slow && l.name != meshName && l.name != versusName: // that is its figure
					r.stall(t, l.name)
				case err != nil: // the others go on
					r.fail(fmt.Sprintf("round %d, %s, %s: %v", round+1, t.title(), l.name, err))
				default:
					r.add(round, t, l, out)
				}
			}
		}
		fmt.Fprintf(os.Stderr, "bench: %s, round %d of %d is done\n", f.setting, round+1, f.options.rounds)
	}
	after, err := f.usage()
	if err != nil {
		return err
	}
	r.Others = append(r.Others, after.since(before, f.setting))
	return nil
}

// estimate is how long the rounds take.
func (f *field) estimate(trials []trial) time.Duration {
	const start = 50 * time.Millisecond // of a client
	var sum time.Duration
	for _, t := range trials {
		for _, l := range f.lanes {
			if l.scenario == t.Scenario {
				job := f.options.job(t, l)
				sum += job.Warmup + job.Window + start
			}
		}
	}
	return sum * time.Duration(f.options.rounds)
}

// check waits until a contender serves, and proves that it does what all are
// to do: HTTP arrives with the caller's identity, and rules are enforced.
func (f *field) check(ctx context.Context, l lane) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if l.scenario == stream {
		return f.retry(ctx, func() error {
			out, err := f.client(ctx, load.Job{Address: l.address, Connections: 1, Window: 20 * time.Millisecond})
			if err == nil && out.Bytes == 0 {
				err = errors.New("no byte came")
			}
			return err
		})
	}
	get := get
	if l.scenario.http2() {
		get = get2
	}
	url := "http://" + l.address
	err := f.retry(ctx, func() error {
		status, body, err := get(ctx, url+load.EchoPath)
		switch {
		case err != nil:
			return err
		case status != http.StatusOK:
			return fmt.Errorf("status %d: %s", status, body)
		case !carriesCaller(body):
			return fmt.Errorf("the request arrives without the caller's identity: %q", body)
		}
		return nil
	})
	if err != nil || l.bare {
		return err
	}
	if status, body, err := get(ctx, url+"/admin/users"); err != nil || status != http.StatusForbidden {
		return fmt.Errorf("/admin/ should be refused by 403: status %d, %s, error %w", status, body, err)
	}
	return nil
}

// carriesCaller tells whether a request's head names caller and callee. Envoy
// puts a hash between the two.
func carriesCaller(head string) bool {
	for line := range strings.Lines(head) {
		name, value, _ := strings.Cut(line, ": ")
		if !strings.EqualFold(name, "x-forwarded-client-cert") {
			continue
		}
		for _, callee := range []spiffe.ID{api(), service(clusterName(http2Cluster))} {
			by, uri, _ := strings.Cut(l7.ForwardedClientCert(callee, web()), ";")
			if strings.HasPrefix(value, by+";") && strings.HasSuffix(value, ";"+uri+"\r\n") {
				return true
			}
		}
	}
	return false
}

// retry tries for as long as ctx allows and all processes live.
func (f *field) retry(ctx context.Context, try func() error) error {
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	var err error
	for {
		now := try()
		if now == nil {
			return nil
		}
		if ctx.Err() == nil { // else the error is that
			err = now
		}
		if ended := f.alive(); ended != nil {
			return errors.Join(err, ended)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return err
		}
	}
}

func get(ctx context.Context, url string) (status int, body string, err error) {
	return fetch(ctx, http.DefaultClient, url)
}

// get2 asks over HTTP/2 with prior knowledge.
func get2(ctx context.Context, url string) (status int, body string, err error) {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	return fetch(ctx, &http.Client{Transport: transport}, url)
}

func fetch(ctx context.Context, client *http.Client, url string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	req.Close = true
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data), errors.Join(err, resp.Body.Close())
}
