package cluster

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Linux lets a process have its own monotonic clock (time_namespaces(7)), but no
// wall clock of its own, and Go programs ask for it without a system call. So the
// servers of a Plan with Clock are built with a package time of their own: its Now
// adds the seconds that a mapped file holds. Certificates, expiry and logs go by it;
// timers and the monotonic clock do not.
const (
	clockEnv  = "MESHD_TEST_CLOCK"
	clockCall = "sec, nsec, mono := runtimeNow()\n\tif mono == 0 {"
	clockFile = `package time

import "syscall"

var testClock = func() *[8]byte {
	path, ok := syscall.Getenv("` + clockEnv + `")
	if !ok {
		return new([8]byte)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("time: open the test's clock: " + err.Error())
	}
	page, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("time: map the test's clock: " + err.Error())
	}
	return (*[8]byte)(page)
}()

func testOffset() int64 {
	var n uint64
	for i, b := range testClock {
		n |= uint64(b) << (8 * i)
	}
	return int64(n)
}
`
)

// buildSkewed builds the meshd whose clock can be set, unless that was done.
func buildSkewed(t *testing.T) {
	t.Helper()
	dir := filepath.Join(programs, folderSkewed)
	if _, err := os.Stat(dir); err == nil {
		return
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	in := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	source, err := os.ReadFile(filepath.Join(in, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(source), clockCall) != 1 {
		t.Fatalf("time.Now of this Go is not written as expected: adapt clockCall to %s/time.go", in)
	}
	own := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(own, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(in, "time.go"):      write("time.go", strings.Replace(string(source), clockCall, strings.Replace(clockCall, "()", "()\n\tsec += testOffset()", 1), 1)),
		filepath.Join(in, "testclock.go"): write("testclock.go", clockFile),
	}})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if out, err := exec.Command("go", "build", "-overlay", write("overlay.json", string(overlay)), "-o", dir+"/", "github.com/meshd/meshd/cmd/meshd").CombinedOutput(); err != nil {
		t.Fatalf("go build -overlay: %v\n%s", err, out)
	}
	t.Logf("built a meshd with a clock of its own in %s", time.Since(began).Round(time.Second))
}

// clockPath is the file that holds how far the server's clock is off.
func (s *Server) clockPath() string { return s.Path("clock") }

// SetClock moves the server's wall clock away from the machine's, at once. The Plan
// must have Clock.
func (s *Server) SetClock(offset time.Duration) {
	s.T.Helper()
	f, err := os.OpenFile(s.clockPath(), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		s.T.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // written below
	seconds := binary.LittleEndian.AppendUint64(nil, uint64(int64(offset/time.Second)))
	if _, err := f.WriteAt(seconds, 0); err != nil { // not truncated first: a mapped page must stay
		s.T.Fatal(err)
	}
}
