package main_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// programs builds the benchmark and what it measures.
func programs(t *testing.T) (dir, bench, mesh string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "b") //nolint:usetesting // it must be short, for sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bench, mesh = filepath.Join(dir, "bench"), filepath.Join(dir, "mesh-proxy")
	for to, from := range map[string]string{bench: ".", mesh: "../../cmd/mesh-proxy"} {
		if out, err := exec.Command("go", "build", "-o", to, from).CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", from, err, out)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "t"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir, bench, mesh
}

// command runs the benchmark with short windows; its temporary files are in
// dir/t.
func command(dir, bench, mesh string, args ...string) *exec.Cmd {
	cmd := exec.Command(bench, append([]string{
		"-mesh-proxy", mesh, "-json", filepath.Join(dir, "bench.json"), "-envoy", filepath.Join(dir, "no-envoy"),
		"-connections", "8", "-window", "50ms", "-rate-window", "100ms", "-warmup", "20ms",
	}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(dir, "t"))
	cmd.Dir = dir
	return cmd
}

// left fails if the benchmark left files or processes behind.
func left(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "t"))
	if err != nil || len(entries) > 0 {
		t.Errorf("temporary files are left: %v, %v", entries, err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range processes {
		if line, err := os.ReadFile(path); err == nil && bytes.Contains(line, []byte(dir+"/")) {
			t.Errorf("a process is left: %q", line)
		}
	}
}

// Everything that the benchmark measures, once, with figures that mean nothing.
func TestEveryCase(t *testing.T) {
	dir, bench, mesh := programs(t)
	page := filepath.Join(dir, "page.md")
	out, err := command(dir, bench, mesh, "-rounds", "1", "-only", "plain,two-hops,tcp,h2,h2-two-hops,idle", "-idle-connections", "5",
		"-idle-for", "10ms", "-cpus", "unpinned", "-versus", mesh, "-versus-hop", bench, "-write", page).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	left(t, dir)
	if want := "Envoy is missing: "; !bytes.Contains(out, []byte(want)) {
		t.Errorf("it does not say %q:\n%s", want, out)
	}
	var got struct {
		Samples []struct {
			Setting, Scenario, Load, Body, Name, Call string
			Slow                                      bool
			Requests                                  int
			Bytes                                     int64
			CPU                                       []int64
		}
		Idle []struct{ Name string } `json:"per_idle_connection"`
	}
	data, err := os.ReadFile(filepath.Join(dir, "bench.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	seen, cpu := map[string]int{}, int64(0)
	for _, s := range got.Samples {
		if s.Slow {
			continue // some proxies stall
		}
		what := fmt.Sprint(s.Scenario, " ", s.Load, " ", s.Body, " ", s.Name)
		if s.Call != "" {
			what += " " + s.Call
		}
		seen[what]++
		if s.Bytes == 0 || s.Scenario != "tcp" && s.Call == "" && s.Requests == 0 {
			t.Errorf("nothing was measured: %+v", s)
		}
		cpu += slices.Max(s.CPU)
	}
	want := map[string]int{"tcp saturation  HAProxy": 1, "tcp saturation  mesh-proxy": 1, "tcp saturation  versus": 1}
	for _, load := range []string{"saturation", "rate"} {
		for _, body := range []string{"100", "10k"} {
			for _, who := range []string{"plain mesh-proxy", "plain versus", "plain HAProxy", "plain nginx", "two-hops mesh-proxy", "two-hops versus", "two-hops HAProxy"} {
				scenario, name, _ := strings.Cut(who, " ")
				want[fmt.Sprint(scenario, " ", load, " ", body, " ", name)] = 1
			}
		}
	}
	for _, who := range []string{"h2 mesh-proxy", "h2 versus", "h2 nghttpx", "h2 HAProxy", "h2 net/http", "h2-two-hops mesh-proxy", "h2-two-hops versus", "h2-two-hops nghttpx", "h2-two-hops HAProxy"} {
		scenario, name, _ := strings.Cut(who, " ")
		for _, what := range []string{"saturation 100 %s h2", "saturation 10k %s h2", "saturation 100 %s unary", "saturation 10k %s unary", "saturation 100 %s streaming", "rate 100 %s h2"} {
			want[scenario+" "+fmt.Sprintf(what, name)] = 1
		}
	}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("samples: %s", diff)
	}
	if cpu == 0 {
		t.Error("nothing cost anything")
	}
	if len(got.Idle) != 3 {
		t.Errorf("idle connections of %v, want three proxies", got.Idle)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"## Side by side", "## Beside slow streams", "### nghttpx, far", "÷ versus", "### HAProxy, far", "  # … 4 more", "allow 192.0.2.0;", "x-forwarded-client-cert"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("the page has no %q", want)
		}
	}
	for _, never := range []string{"service-", dir + "/t", "allow 192.0.2.9;", "NaN", "Inf"} {
		if bytes.Contains(text, []byte(never)) {
			t.Errorf("the page has %q", never)
		}
	}
}

func TestInterrupt(t *testing.T) {
	dir, bench, mesh := programs(t)
	cmd := command(dir, bench, mesh, "-rounds", "1000000", "-only", "two-hops", "-peers", "mesh-proxy,haproxy")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	last := ""
	for sent := false; lines.Scan(); last = lines.Text() {
		if !sent && strings.Contains(lines.Text(), "round 2 of") {
			sent = true
			// To all of the group, as a terminal does.
			if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || last != "bench: interrupted" {
		t.Errorf("error %v, the last line is %q", err, last)
	}
	left(t, dir)
}

// A contender that dies does not take the figures of the others with it.
func TestContenderDies(t *testing.T) {
	dir, bench, mesh := programs(t)
	cmd := command(dir, bench, mesh, "-rounds", "6", "-only", "two-hops", "-load", "saturation", "-body", "100",
		"-cpus", "unpinned", "-peers", "mesh-proxy,versus", "-versus", mesh)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		if strings.Contains(lines.Text(), "round 2 of") {
			kill(t, filepath.Join(dir, "t"), "/versus/s")
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it ended as if nothing had failed")
	}
	left(t, dir)
	for _, want := range []string{"failed: round ", ", versus: "} {
		if !strings.Contains(said.String(), want) || !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s\n%s", want, said.String(), stdout.String())
		}
	}
	var got struct{ Samples []struct{ Name string } }
	data, err := os.ReadFile(filepath.Join(dir, "bench.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, s := range got.Samples {
		count[s.Name]++
	}
	if count["mesh-proxy"] != 6 || count["versus"] < 2 || count["versus"] > 5 {
		t.Errorf("samples %v, want all six of mesh-proxy and a part of versus", count)
	}
}

// kill ends the processes whose command line has both texts.
func kill(t *testing.T, texts ...string) {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, path := range processes {
		line, err := os.ReadFile(path)
		if err != nil || slices.ContainsFunc(texts, func(text string) bool { return !bytes.Contains(line, []byte(text)) }) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed++
	}
	if killed == 0 {
		t.Errorf("no process to kill with %q", texts)
	}
}

func TestFlags(t *testing.T) {
	dir, bench, mesh := programs(t)
	for want, args := range map[string][]string{
		`"three" is none of plain, two-hops, tcp, h2, h2-two-hops, idle, mallocs`: {"-only", "three"},
		"there are no arguments":                     {"now"},
		"run: make build":                            {"-versus", "/nowhere"},
		"counts and lengths are positive; see -help": {"-rounds", "0"},
	} {
		if out, err := command(dir, bench, mesh, args...).CombinedOutput(); err == nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q: error %v, no %q in\n%s", args, err, want, out)
		}
	}
	out, err := exec.Command(bench, "-help").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("-versus")) {
		t.Errorf("-help: %v\n%s", err, out)
	}
}
