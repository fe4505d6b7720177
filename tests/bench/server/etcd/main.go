// Command etcd is etcd's own server, of the version that this module requires:
// distributions have older ones. It is built by make bench-server, and nothing
// else in this repository depends on it.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
