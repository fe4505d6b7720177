// Command interop runs cases of grpc-go's interoperability suite, of the version
// that this module requires, against its server, which the module builds, too:
//
//	interop ADDRESS:PORT CASE...
//
// Left out are the cases that are about TLS and credentials, and the one for servers
// that tell their names. It ends with 1 at the
// first case that fails.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	"google.golang.org/grpc/interop/grpc_testing"
)

// Messages of a soak, and how many calls it makes.
const (
	soakRequest  = 271828
	soakResponse = 314159
	soakCalls    = 20
)

// loadConfig is what the cases about reports of load need.
const loadConfig = `{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}`

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: interop ADDRESS:PORT CASE...")
		os.Exit(2)
	}
	for _, name := range os.Args[2:] {
		if err := run(os.Args[1], name); err != nil {
			fmt.Fprintln(os.Stderr, "interop:", err)
			os.Exit(1)
		}
		fmt.Println("passed:", name)
	}
}

// run runs a case: the suite ends the program if it fails.
func run(address, name string) error {
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if name == "orca_per_rpc" || name == "orca_oob" {
		options = append(options, grpc.WithDisableServiceConfig(), grpc.WithDefaultServiceConfig(loadConfig))
	}
	cc, err := grpc.NewClient(address, options...)
	if err != nil {
		return err
	}
	defer func() { _ = cc.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tc := grpc_testing.NewTestServiceClient(cc)
	soak := interop.SoakTestConfig{
		RequestSize: soakRequest, ResponseSize: soakResponse, Iterations: soakCalls, NumWorkers: 2, ServerAddr: address,
		PerIterationMaxAcceptableLatency: 10 * time.Second, OverallTimeout: time.Minute,
		ChannelForTest: func() (*grpc.ClientConn, func()) { return cc, func() {} },
	}
	cases := map[string]func(){
		"empty_unary":                 func() { interop.DoEmptyUnaryCall(ctx, tc) },
		"large_unary":                 func() { interop.DoLargeUnaryCall(ctx, tc) },
		"client_streaming":            func() { interop.DoClientStreaming(ctx, tc) },
		"server_streaming":            func() { interop.DoServerStreaming(ctx, tc) },
		"ping_pong":                   func() { interop.DoPingPong(ctx, tc) },
		"empty_stream":                func() { interop.DoEmptyStream(ctx, tc) },
		"timeout_on_sleeping_server":  func() { interop.DoTimeoutOnSleepingServer(ctx, tc) },
		"cancel_after_begin":          func() { interop.DoCancelAfterBegin(ctx, tc) },
		"cancel_after_first_response": func() { interop.DoCancelAfterFirstResponse(ctx, tc) },
		"status_code_and_message":     func() { interop.DoStatusCodeAndMessage(ctx, tc) },
		"special_status_message":      func() { interop.DoSpecialStatusMessage(ctx, tc) },
		"custom_metadata":             func() { interop.DoCustomMetadata(ctx, tc) },
		"unimplemented_method":        func() { interop.DoUnimplementedMethod(ctx, cc) },
		"unimplemented_service":       func() { interop.DoUnimplementedService(ctx, grpc_testing.NewUnimplementedServiceClient(cc)) },
		"orca_per_rpc":                func() { interop.DoORCAPerRPCTest(ctx, tc) },
		"orca_oob":                    func() { interop.DoORCAOOBTest(ctx, tc) },
		"rpc_soak":                    func() { interop.DoSoakTest(ctx, soak) },
		"channel_soak": func() {
			soak.ChannelForTest = func() (*grpc.ClientConn, func()) {
				fresh, err := grpc.NewClient(address, options...)
				if err != nil {
					panic(err)
				}
				return fresh, func() { _ = fresh.Close() }
			}
			interop.DoSoakTest(ctx, soak)
		},
	}
	do := cases[name]
	if do == nil {
		return fmt.Errorf("no such case: %s", name)
	}
	do()
	return nil
}
