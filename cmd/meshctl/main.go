// Command meshctl is the command line of the mesh.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the build.
var version = "devel" //nolint:gochecknoglobals // the linker sets it

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.Getenv}
	root := a.root() //nolint:contextcheck // each command gets ctx from ExecuteContext below
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil {
		if text := err.Error(); text != "" {
			fmt.Fprintln(os.Stderr, "meshctl: "+text)
		}
	}
	return exitCode(err)
}
