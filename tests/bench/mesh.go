package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/tests/conformance/rig"
)

const (
	meshName   = "mesh-proxy"
	versusName = "versus"

	startTimeout = 20 * time.Second
	callerID     = "near"
	calleeID     = "far"
)

// meshPair starts two mesh-proxy processes with identities, policy and
// metrics, fed as an agent would feed them.
func (f *field) meshPair(ctx context.Context, name, program string) error {
	if program == "" {
		return nil // only one of the two kinds of versus
	}
	dir := f.path(name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("open the feed: %w", err)
	}
	server := feed.NewServer(feed.ServerConfig{Log: slog.New(slog.DiscardHandler)})
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	stopped := make(chan error, 1)
	go func() { stopped <- server.Run(running, l) }()
	f.closers = append(f.closers, func() error {
		stop()
		return errors.Join(<-stopped, server.Close())
	})
	meshes, err := f.calleePlan(server)
	if err != nil {
		return err
	}
	upstreams, err := f.callerPlan(server, meshes)
	if err != nil {
		return err
	}
	var parts []part
	var processes []*rig.Process
	for _, id := range []string{callerID, calleeID} {
		metrics, err := freePort()
		if err != nil {
			return err
		}
		p, err := rig.Start(program, []string{
			"--feed", socket, "--id", id, "--state", filepath.Join(dir, id), "--metrics", metrics, "--drain-timeout", "1s",
		}, rig.Options{})
		pid, err := f.started(p, err)
		if err != nil {
			return err
		}
		processes = append(processes, p)
		parts = append(parts, part{role: id, pids: []int{pid}, metrics: "http://" + metrics + "/metrics"})
	}
	parts[1].mesh = meshes[0]
	f.lanes = append(f.lanes, lane{scenario: mutual, name: name, address: upstreams[httpCluster], parts: parts}, lane{scenario: stream, name: name, address: upstreams[streamCluster], parts: parts},
		lane{scenario: mutual2, name: name, address: upstreams[http2Cluster], parts: parts})
	return inForce(ctx, server, processes)
}

// inForce waits until the processes run their plans.
func inForce(ctx context.Context, server *feed.Server, processes []*rig.Process) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		changed := server.Changed()
		applied := 0
		for _, st := range server.Status() {
			if st.Refused != "" {
				return fmt.Errorf("%s refuses its plan: %s", st.Proxy, st.Refused)
			}
			if st.Applied == st.Wanted && !st.Applied.IsZero() {
				applied++
			}
		}
		if applied == len(processes) {
			return nil
		}
		select {
		case <-changed:
		case <-processes[0].Done():
			return errors.New("the near proxy ended")
		case <-processes[1].Done():
			return errors.New("the far proxy ended")
		case <-ctx.Done():
			return fmt.Errorf("wait for the plans to be in force: %w; status %+v", ctx.Err(), server.Status())
		}
	}
}

func (f *field) plan() proxy.Config {
	return proxy.Config{
		Position: catalog.Position{Generation: "bench", Revision: 1}, Bundle: f.authority.Bundle, TrustDomain: trustDomain,
	}
}

const meshPort = "main"

func instance(i int) string { return fmt.Sprintf("i%d", i) }

func protocol(cluster int) catalog.Protocol {
	switch cluster {
	case streamCluster:
		return catalog.ProtocolTCP
	case http2Cluster:
		return catalog.ProtocolHTTP2
	}
	return catalog.ProtocolHTTP
}

// calleePlan has a mesh port per instance, and returns their addresses.
func (f *field) calleePlan(server *feed.Server) ([]string, error) {
	addresses, files, err := f.listen(endpoints)
	if err != nil {
		return nil, err
	}
	plan := f.plan()
	sockets := map[string]*os.File{}
	var leaves []*ca.Leaf
	for i, address := range addresses {
		name := fmt.Sprintf("mesh-%d", i)
		plan.Listeners = append(plan.Listeners, proxy.Listener{Name: name, Kind: proxy.ListenMesh, Address: address})
		sockets[name] = files[i]
	}
	for cluster, local := range map[int]string{httpCluster: f.backend, streamCluster: f.stream, http2Cluster: f.backend2} {
		name := clusterName(cluster)
		for i := range endpoints {
			plan.Inbounds = append(plan.Inbounds, proxy.Inbound{
				ServerName: proxy.ServerName(meshPort, instance(i), name, catalog.DefaultNamespace), Service: service(name),
				Instance: instance(i), Port: meshPort, Protocol: protocol(cluster), Local: local,
			})
		}
		plan.Policies = append(plan.Policies, proxy.Policy{
			Service: catalog.Name{Namespace: catalog.DefaultNamespace, Name: name}, Intentions: meshIntentions(cluster),
		})
		leaf, err := f.authority.Leaf(service(name))
		if err != nil {
			return nil, err
		}
		leaves = append(leaves, leaf)
	}
	return addresses, errors.Join(
		server.SetKeys(calleeID, leaves), server.SetSockets(calleeID, sockets), server.SetPlan(calleeID, plan),
	)
}

// meshIntentions are one per caller.
func meshIntentions(cluster int) []intentions.Intention {
	out := make([]intentions.Intention, 0, rules)
	for _, id := range callers() {
		in := intentions.Intention{Source: id.Name, Destination: clusterName(cluster), Action: intentions.Allow}
		if cluster != streamCluster {
			in.Action = ""
			in.Rules = []intentions.Rule{
				{Action: intentions.Deny, PathPrefix: "/admin/"},
				{Action: intentions.Allow, Methods: []string{"GET", "HEAD", "POST"}, PathPrefix: "/"},
			}
		}
		out = append(out, in)
	}
	return out
}

// callerPlan has a listener per cluster, and returns their addresses.
func (f *field) callerPlan(server *feed.Server, meshes []string) ([]string, error) {
	addresses, files, err := f.listen(clusters)
	if err != nil {
		return nil, err
	}
	plan := f.plan()
	sockets := map[string]*os.File{}
	for c := range clusters {
		name := clusterName(c)
		cluster := proxy.Cluster{
			Name: catalog.DefaultNamespace + "/" + name + ":" + meshPort, Service: service(name), Port: meshPort, Protocol: protocol(c),
		}
		for i, address := range meshes {
			cluster.Endpoints = append(cluster.Endpoints, proxy.Endpoint{
				Instance: instance(i), Node: fmt.Sprintf("node-%d", i), Address: address,
				ServerName: proxy.ServerName(meshPort, instance(i), name, catalog.DefaultNamespace),
			})
		}
		plan.Clusters = append(plan.Clusters, cluster)
		listener := proxy.Listener{
			Name: "upstream/" + web().Name + "/" + name + "/" + meshPort, Kind: proxy.ListenUpstream, Address: addresses[c],
			Source: web(), Cluster: cluster.Name,
		}
		plan.Listeners = append(plan.Listeners, listener)
		sockets[listener.Name] = files[c]
	}
	leaf, err := f.authority.Leaf(web())
	if err != nil {
		return nil, err
	}
	return addresses, errors.Join(
		server.SetKeys(callerID, []*ca.Leaf{leaf}), server.SetSockets(callerID, sockets), server.SetPlan(callerID, plan),
	)
}
