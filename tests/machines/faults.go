package machines

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// faultsTable is where the packets between two hosts pass, on the bridge. What it
// drops vanishes without a word.
const faultsTable = `
table bridge faults {
	chain forward {
		type filter hook forward priority 0;
	}
}
`

// Drop lets the given share of the packets from one host to the other vanish, in
// percent from 1 to 100, beside what is dropped already.
func (n *Network) Drop(t *testing.T, percent int, from, to *Host) {
	t.Helper()
	rule := fmt.Sprintf("ip saddr %s ip daddr %s ", from.Address, to.Address)
	if percent < 100 {
		rule += fmt.Sprintf("numgen random mod 100 < %d ", percent)
	}
	n.nft(t, faultsTable+"add rule bridge faults forward "+rule+"drop\n")
}

// Cut parts two groups of hosts, in both directions.
func (n *Network) Cut(t *testing.T, some, others []*Host) {
	t.Helper()
	for _, a := range some {
		for _, b := range others {
			n.Drop(t, 100, a, b)
			n.Drop(t, 100, b, a)
		}
	}
}

// Heal ends all that Drop and Cut did.
func (n *Network) Heal(t *testing.T) {
	t.Helper()
	n.nft(t, faultsTable+"flush chain bridge faults forward\n")
}

func (n *Network) nft(t *testing.T, rules string) {
	t.Helper()
	args := []string{"-f", "-"}
	cmd := exec.Command("nft", args...)
	if n.Bridge != "" {
		cmd = exec.Command("ip", append([]string{"netns", "exec", n.Bridge, "nft"}, args...)...)
	}
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s%s", err, rules, out)
	}
}

// Limit bounds what the host sends and what it is sent, each to a rate as tc(8)
// spells it, such as 1mbit.
func (n *Network) Limit(t *testing.T, h *Host, rate string) {
	t.Helper()
	bucket := []string{"root", "tbf", "rate", rate, "burst", "16kb", "latency", "300ms"}
	run(t, "tc", append([]string{"-n", h.Namespace, "qdisc", "replace", "dev", "eth0"}, bucket...)...)
	run(t, "tc", append(n.on("qdisc", "replace", "dev", h.Port), bucket...)...)
}

// Unlimit ends what Limit did.
func (n *Network) Unlimit(t *testing.T, h *Host) {
	t.Helper()
	run(t, "tc", "-n", h.Namespace, "qdisc", "del", "dev", "eth0", "root")
	run(t, "tc", n.on("qdisc", "del", "dev", h.Port, "root")...)
}
