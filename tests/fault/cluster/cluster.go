package cluster

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/machines"
)

// Plan is what a cluster is made of. The zero Plan is one server of the programs
// that users get.
type Plan struct {
	Servers int
	// Faulty takes the programs with the build tag fault.
	Faulty bool
	// Clock takes servers whose wall clock Server.SetClock moves.
	Clock bool
	// Config is added to each server's configuration.
	Config string
	// Prepare, if not nil, is called for each server before it is started the first
	// time: it may mount something at s.Data(), or set s.Env.
	Prepare func(s *Server)
}

func (p Plan) folder() string {
	switch {
	case p.Clock:
		return folderSkewed
	case p.Faulty:
		return folderFaulty
	default:
		return folderNormal
	}
}

// Cluster is a few servers, which the test reaches over the network. Its methods are
// for the test's own goroutine, unless they say otherwise.
type Cluster struct {
	Net     *machines.Network
	Servers []*Server
	// Roots are those of the cluster's certificates.
	Roots ca.Bundle

	t    *testing.T
	plan Plan
	key  string // the path of the cluster's key

	elections []Election
}

// Server is one of a cluster, on a host of its own.
type Server struct {
	*machines.Host
	// Config is the path of its configuration.
	Config string
	// Process is the newest; nil before the first start.
	Process *machines.Process
	// Wrap is put before the command that starts it.
	Wrap []string
	// Programs is the folder that its program is taken from at the next Start.
	Programs string

	cluster *Cluster
	left    bool
	read    int64 // of its log, by news
}

// AdminToken is the operator's own first token. No log may show it.
const AdminToken = "fault-canary-token-0123456789-abcdef"

const serverConfig = `
trust_domain         = "mesh.example.com"
name                 = %[1]q
cluster_key_file     = "%[2]s/cluster.key"
bootstrap_token_file = "%[2]s/bootstrap.token"
data_dir             = "%[2]s/data"
admin_socket         = "%[2]s/server.sock"
bind                 = %[3]q
advertise            = %[3]q
`

// New starts a cluster and waits until each server answers.
func New(t *testing.T, p Plan) *Cluster {
	t.Helper()
	p.Servers = max(p.Servers, 1)
	if p.Clock {
		buildSkewed(t)
	}
	c := &Cluster{t: t, Net: machines.NewLocalNetwork(t, filepath.Join(programs, p.folder())), plan: p}
	for i := range p.Servers {
		c.Add(fmt.Sprintf("s%d", i+1))
	}
	for _, s := range c.Servers {
		s.Configure(p.Servers, c.Addresses(s))
		if p.Prepare != nil {
			p.Prepare(s)
		}
	}
	for _, s := range c.Servers {
		s.Start()
	}
	// Cleanups run in the reverse order: this one while the files are there.
	t.Cleanup(c.sweep)
	t.Cleanup(c.keepLogs)
	for _, s := range c.Servers {
		s.Ready(30 * time.Second)
	}
	return c
}

// Add makes a server that is neither configured nor started.
func (c *Cluster) Add(name string) *Server {
	c.t.Helper()
	s := &Server{Host: c.Net.Host(c.t, name), Programs: filepath.Join(programs, c.plan.folder()), cluster: c}
	c.Servers = append(c.Servers, s)
	if c.key == "" {
		c.key = s.Path("cluster.key")
		if r := s.Run(Program("meshctl", false), "operator", "keygen", c.key); r.Code != 0 {
			c.t.Fatalf("keygen: %s", r.Stderr)
		}
	} else {
		key, err := os.ReadFile(c.key)
		if err != nil {
			c.t.Fatal(err)
		}
		s.Write(string(key), 0o600, "cluster.key")
	}
	s.Write(AdminToken+"\n", 0o600, "bootstrap.token")
	if c.plan.Clock {
		s.SetClock(0)
		s.Env = append(s.Env, clockEnv+"="+s.clockPath())
	}
	return s
}

// Addresses lists where other servers listen for this one.
func (c *Cluster) Addresses(but *Server) []string {
	var out []string
	for _, s := range c.Servers {
		if s != but {
			out = append(out, s.Address+":7401")
		}
	}
	return out
}

// Configure writes the server's configuration.
func (s *Server) Configure(expect int, join []string) {
	s.T.Helper()
	text := fmt.Sprintf(serverConfig, s.Name, s.Dir, s.Address)
	if len(join) > 0 {
		text += fmt.Sprintf("bootstrap_expect = %d\nretry_join = [%s]\n", expect, `"`+strings.Join(join, `", "`)+`"`)
	}
	s.Config = s.Write(text+s.cluster.plan.Config, 0o600, "server.hcl")
}

// Data is the server's data directory.
func (s *Server) Data() string { return s.Path("data") }

// Socket is the address of its API for its own user.
func (s *Server) Socket() string { return "unix://" + s.Path("server.sock") }

// Start starts the server's process and waits for nothing.
func (s *Server) Start() {
	s.T.Helper()
	command := append(slices.Clone(s.Wrap), filepath.Join(s.Programs, "meshd"), "server", "--config", s.Config)
	s.Process = s.Host.Start("server", command[0], command[1:]...)
}

// Ready waits until the server answers a read that asks a majority.
func (s *Server) Ready(limit time.Duration) time.Duration {
	s.T.Helper()
	local := s.Dial(s.Socket())
	return machines.Eventually(s.T, limit, s.Name+" answers", func() string {
		if !s.Process.Running() {
			s.T.Fatalf("%s has ended: %v\n%s", s.Name, s.Process.Err(), machines.Tail(s.Process.Log, 20))
		}
		ctx, cancel := context.WithTimeout(s.T.Context(), 2*time.Second)
		defer cancel()
		if _, err := local.List(ctx, client.KindNamespace, client.Selection{}); err != nil {
			return err.Error()
		}
		if s.cluster.Roots.IsZero() {
			roots, err := local.Roots(ctx)
			if err != nil {
				return err.Error()
			}
			s.cluster.Roots = roots
		}
		return ""
	})
}

// Kill ends the server as a power cut would, but for what is not synced.
func (s *Server) Kill() { s.Process.Kill(syscall.SIGKILL) }

// Freeze stops the server's process where it is.
func (s *Server) Freeze() { s.Process.Kill(syscall.SIGSTOP) }

// Thaw ends what Freeze did.
func (s *Server) Thaw() { s.Process.Kill(syscall.SIGCONT) }

// Leave says that the server is no part of the cluster any more: it need not agree
// with the others at the end.
func (s *Server) Leave() { s.left = true }

// Stop asks the server to end, and waits until it has.
func (s *Server) Stop() {
	s.T.Helper()
	s.Process.Stop(s.T, 20*time.Second)
}

// API returns a client of the server over HTTPS, with the admin's token.
func (s *Server) API() *client.Client { return s.Dial("https://" + s.Address + ":7400") }

// Dial returns a client of the server at an address, with the admin's token.
func (s *Server) Dial(address string) *client.Client {
	s.T.Helper()
	api, err := client.New(client.Config{Address: address, Token: ca.NewSecret([]byte(AdminToken)), Roots: s.cluster.Roots, Timeout: 5 * time.Second})
	if err != nil {
		s.T.Fatal(err)
	}
	return api
}

// Hosts are those of servers, for the network.
func Hosts(servers ...*Server) []*machines.Host {
	var out []*machines.Host
	for _, s := range servers {
		out = append(out, s.Host)
	}
	return out
}

// Others are all servers but these.
func (c *Cluster) Others(these ...*Server) []*Server {
	return slices.DeleteFunc(slices.Clone(c.Servers), func(s *Server) bool { return slices.Contains(these, s) })
}

// An Election is one that a server says to have won.
type Election struct {
	Server *Server
	Term   uint64
}

var electionWon = regexp.MustCompile(`msg="election won" .*\bterm=(\d+)`) //nolint:gochecknoglobals // compiled once, never changed

// Elections returns those that were won so far, in the order of terms, by what the
// servers' logs say. Two leaders of one term are the end of the test.
func (c *Cluster) Elections() []Election {
	c.t.Helper()
	for _, s := range c.Servers {
		for _, line := range s.news() {
			m := electionWon.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			term, _ := strconv.ParseUint(m[1], 10, 64) // digits
			for _, e := range c.elections {
				if e.Term == term && e.Server != s {
					c.t.Fatalf("%s and %s both won the election of term %d", e.Server.Name, s.Name, term)
				}
			}
			c.elections = append(c.elections, Election{s, term})
		}
	}
	slices.SortFunc(c.elections, func(a, b Election) int { return cmp.Compare(a.Term, b.Term) })
	return slices.Clone(c.elections)
}

// news returns the lines of the log that were not looked at yet.
func (s *Server) news() []string {
	s.T.Helper()
	if s.Process == nil {
		return nil
	}
	f, err := os.Open(s.Process.Log)
	if err != nil {
		s.T.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // it is only read
	data, err := io.ReadAll(io.NewSectionReader(f, s.read, 1<<30))
	if err != nil {
		s.T.Fatal(err)
	}
	whole := strings.LastIndexByte(string(data), '\n') + 1
	s.read += int64(whole)
	return strings.Split(string(data[:whole]), "\n")
}

// Leader returns who won the newest election.
func (c *Cluster) Leader() *Server {
	c.t.Helper()
	all := c.Elections()
	if len(all) == 0 {
		c.t.Fatal("no server has won an election")
	}
	return all[len(all)-1].Server
}

// NewLeader waits until there was another election after the given ones, and
// returns how long that took.
func (c *Cluster) NewLeader(before int, limit time.Duration) time.Duration {
	c.t.Helper()
	return machines.Eventually(c.t, limit, "another leader", func() string {
		if n := len(c.Elections()); n <= before {
			return fmt.Sprintf("%d elections, as before", n)
		}
		return ""
	})
}

// keeps reports whether what a test leaves is kept: it failed, or go test -artifacts
// asks for it.
func keeps(t *testing.T) bool {
	t.Helper()
	wanted := flag.Lookup("test.artifacts")
	return t.Failed() || wanted != nil && wanted.Value.String() == "true"
}

// keepLogs copies the servers' logs to where the test's artifacts go.
func (c *Cluster) keepLogs() {
	if !keeps(c.t) {
		return
	}
	for _, s := range c.Servers {
		if s.Process == nil {
			continue
		}
		if err := copyFile(s.Process.Log, filepath.Join(c.t.ArtifactDir(), s.Name+".log")); err != nil {
			c.t.Log(err)
		}
	}
	c.t.Logf("logs are in %s", c.t.ArtifactDir())
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("keep a log: %w", err)
	}
	defer in.Close() //nolint:errcheck // it is only read
	out, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("keep a log: %w", err)
	}
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("keep a log: %w", err)
	}
	return out.Close() //nolint:wrapcheck // of os, with the path
}
