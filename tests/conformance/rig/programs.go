package rig

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// StartNginx starts nginx in the foreground with its configuration in dir,
// which main and http complete: main is the text before, http the text inside
// of the http block. sockets are listening sockets that "listen" lines name by
// address. Lines of access_log /dev/stdout go to logged.
func StartNginx(dir, main, http string, sockets []*os.File, logged func(string)) (*Process, error) {
	path, err := Find("nginx")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("start nginx: %w", err)
	}
	if os.Geteuid() == 0 {
		main = "user root;\n" + main // else workers are nobody, who may not enter dir
	}
	var conf strings.Builder
	fmt.Fprintf(&conf, "daemon off;\npid %[1]s/pid;\nerror_log stderr crit;\n%[2]s\nhttp {\n", dir, main)
	for _, temp := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		fmt.Fprintf(&conf, "  %s_temp_path %s/%s;\n", temp, dir, temp)
	}
	conf.WriteString(http + "}\n")
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf.String()), 0o600); err != nil {
		return nil, fmt.Errorf("start nginx: %w", err)
	}
	// NGINX names inherited sockets: how nginx hands them to its own next
	// version. So no port is ever chosen twice.
	var env strings.Builder
	for i := range sockets {
		env.WriteString(strconv.Itoa(3+i) + ";")
	}
	return Start(path, []string{"-c", file, "-p", dir, "-e", "stderr"}, Options{
		Env: []string{"NGINX=" + env.String()}, Files: sockets, Stdout: logged,
	})
}

// StartHAProxy starts HAProxy in the foreground. Its configuration binds
// fd@3, fd@4 and so on to take the sockets. Lines of log stdout go to logged.
func StartHAProxy(dir, conf string, sockets []*os.File, logged func(string)) (*Process, error) {
	path, err := Find("haproxy")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("start haproxy: %w", err)
	}
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, fmt.Errorf("start haproxy: %w", err)
	}
	return Start(path, []string{"-db", "-f", file}, Options{Files: sockets, Stdout: logged})
}
