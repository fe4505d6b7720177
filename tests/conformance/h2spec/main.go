// Command h2spec is the conformance suite for HTTP/2 of the version that this
// module requires: every case, the strict ones too, against a server that speaks
// HTTP/2 with prior knowledge. It exits with 1 if a case fails.
package main

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/summerwind/h2spec"
	"github.com/summerwind/h2spec/config"
)

// maxHeader is more than any header block of the suite has.
const maxHeader = 4000

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: h2spec ADDRESS:PORT [SECTION...]")
		os.Exit(2)
	}
	address, err := netip.ParseAddrPort(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "h2spec:", err)
		os.Exit(2)
	}
	passed, err := h2spec.Run(&config.Config{
		Host: address.Addr().String(), Port: int(address.Port()), Path: "/", Timeout: 2 * time.Second,
		MaxHeaderLen: maxHeader, Strict: true, Sections: os.Args[2:],
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "h2spec:", err)
	}
	if err != nil || !passed {
		os.Exit(1)
	}
}
