// Package fault_test breaks clusters of real servers, and the networks and machines
// that they run on. Each test is a row of the fault matrix in
// docs/design/reliability.md.
package fault_test

import (
	"os"
	"testing"

	"github.com/meshd/meshd/tests/fault/cluster"
)

func TestMain(m *testing.M) {
	os.Exit(cluster.Main(m)) //nolint:forbidigo // TestMain is the main of a test
}
