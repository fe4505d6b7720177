package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/docs"
)

// machine is a host that looks whole from inside: it has a name, its own /etc,
// /usr/local/bin, /var/lib and /run, so that what documentation tells people to
// type can be typed there as it is.
type machine struct {
	*host
	pid  int
	work string // where commands are typed
}

// machineScript makes the machine: overlays over what commands write, gone with it.
const machineScript = `set -e
name=$1 dir=$2
hostname "$name"
mkdir "$dir/own"
mount -t tmpfs own "$dir/own"
for d in etc usr/local/bin; do
	mkdir -p "$dir/own/$d" "$dir/own/$d.work"
	mount -t overlay overlay -o "lowerdir=/$d,upperdir=$dir/own/$d,workdir=$dir/own/$d.work" "/$d"
done
mkdir "$dir/own/lib"
mount --bind "$dir/own/lib" /var/lib
mount -t tmpfs run /run
rm -rf /etc/meshd
userdel mesh-proxy 2>/dev/null || true
groupdel mesh 2>/dev/null || true
install -m 0755 "$dir/sudo" "$dir/ssh" "$dir/scp" /usr/local/bin/
echo ready
exec sleep infinity
`

// What machines lack, as the tour uses it: root types, and there is no sshd.
const (
	sudoScript = `#!/bin/sh
case $1 in
-u) user=$2; shift 2; exec runuser -u "$user" -- "$@" ;;
*) exec "$@" ;;
esac
`
	sshScript = `#!/bin/sh
host=$1; shift
exec nsenter -t "$(cat '%[1]s'/"$host".pid)" -m -u -n -r -w sh -c "$*"
`
	scpScript = `#!/bin/bash
to=${!#}
for file in "${@:1:$#-1}"; do
	[[ $file == -* ]] || ssh "${to%%:*}" "cat > '${to#*:}/$(basename "$file")'; chmod 0755 '${to#*:}/$(basename "$file")'" <"$file"
done
`
)

// machine makes one. work is the folder in which commands are typed; empty is a
// home of its own.
func (n *network) machine(t *testing.T, name, pids, work string) *machine {
	t.Helper()
	m := &machine{host: n.host(t, name), work: work}
	if work == "" {
		m.work = m.Path("home")
		if err := os.Mkdir(m.work, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Write(sudoScript, 0o755, "sudo")
	m.Write(fmt.Sprintf(sshScript, pids), 0o755, "ssh")
	m.Write(scpScript, 0o755, "scp")
	keeper := m.Start("machine", "unshare", "--mount", "--uts", "sh", "-c", machineScript, "sh", name, m.Dir)
	t.Cleanup(func() { // all that was started there, before the namespace goes
		out, err := exec.Command("ip", "netns", "pids", m.Namespace).Output()
		if err != nil {
			t.Error(err)
		}
		for line := range strings.FieldsSeq(string(out)) {
			if pid, err := strconv.Atoi(line); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	eventually(t, 10*time.Second, name+" is up", func() string {
		if said := tail(keeper.Log, 5); !strings.HasSuffix(said, "ready") {
			return "it says " + said
		}
		return ""
	})
	m.pid = keeper.PID()
	if err := os.WriteFile(filepath.Join(pids, name+".pid"), []byte(strconv.Itoa(m.pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	n.machines = append(n.machines, m)
	t.Cleanup(n.sweepMachines)
	return m
}

// type types a command into a shell of the machine and returns what it printed, and
// its exit status.
func (m *machine) typed(command string) (printed string, status int) {
	m.T.Helper()
	out, err := os.CreateTemp(m.Dir, "typed-*.log")
	if err != nil {
		m.T.Fatal(err)
	}
	defer out.Close() //nolint:errcheck // what goes on in the background writes on
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(m.pid), "-m", "-u", "-n", "-r", "-w", "bash", "-c", "cd '"+m.work+"'\n"+command)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), "NO_COLOR=1", "LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:"+os.Getenv("PATH"))
	err = cmd.Run()
	exit, failed := errors.AsType[*exec.ExitError](err)
	switch {
	case failed:
		status = exit.ExitCode()
	case err != nil:
		m.T.Fatalf("%s: %v", command, err)
	}
	return readFile(m.T, out.Name()), status
}

// step types a command until it does what the page says, as somebody would who
// looks again when a daemon that was just started is not up yet.
func (m *machine) step(where string, s docs.Step) {
	m.T.Helper()
	background := strings.HasSuffix(s.Command, "&")
	eventually(m.T, 20*time.Second, fmt.Sprintf("%s, on %s: %s", where, m.Name, s.Command), func() string {
		printed, status := m.typed(s.Command)
		if status != s.Status {
			return fmt.Sprintf("exit %d, the page says %d; it printed:\n%s", status, s.Status, printed)
		}
		if !background && !docs.Matches(s.Output, printed) {
			return fmt.Sprintf("it printed:\n%s\nthe page says:\n%s", printed, s.Output)
		}
		return ""
	})
}

// TestTour types the tour of the README, command by command, on three machines.
func TestTour(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	snippets, err := docs.Snippets("README.md", readFile(t, filepath.Join(root, "README.md")))
	if err != nil {
		t.Fatal(err)
	}
	net, pids := newNetwork(t), t.TempDir()
	machines := map[string]*machine{}
	for name, work := range map[string]string{"srv": root, "vm-a": "", "vm-b": ""} {
		machines[name] = net.machine(t, name, pids, work)
	}
	typed := 0
	for _, s := range snippets {
		if s.Directive != docs.On {
			continue
		}
		for name := range strings.SplitSeq(s.Host, ",") {
			m := machines[name]
			if m == nil {
				t.Fatalf("%s: there is no machine %q", s.Where(), name)
			}
			if s.Lang != "console" {
				m.put(t, s)
				continue
			}
			steps, err := docs.Transcript(s.Text)
			if err != nil {
				t.Fatalf("%s: %v", s.Where(), err)
			}
			for _, step := range steps {
				m.step(s.Where(), step)
				typed++
			}
		}
	}
	if typed < 20 {
		t.Errorf("the tour has %d commands: is it marked as such?", typed)
	}
}

// put writes a file of the page where its first line says.
func (m *machine) put(t *testing.T, s docs.Snippet) {
	t.Helper()
	if !strings.HasPrefix(s.Name, "/etc/") {
		t.Fatalf("%s: the file's name %q is not below /etc", s.Where(), s.Name)
	}
	quoted := "mkdir -p $(dirname " + s.Name + ") && cat > " + s.Name + " <<'END OF FILE'\n" + s.Text + "END OF FILE\n"
	if printed, status := m.typed(quoted); status != 0 {
		t.Fatalf("%s: write %s: %s", s.Where(), s.Name, printed)
	}
}
