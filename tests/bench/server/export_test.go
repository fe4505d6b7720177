package main

// For tests of package main_test.
var (
	Bars  = (*report).bars
	Parse = parse
	Gauge = gauge
)

type (
	Report   = report
	Writes   = writes
	Recovery = recovery
	Overload = overload
)

// Line is a bar as the table shows it.
func (b bar) Line() [4]string { return [4]string{b.what, b.figure(), b.bar(), string(b.verdict())} }

// Of returns an empty report of that many clients.
func Of(clients int) *Report { return &report{options: options{clients: clients, servers: 3}} }

// Page is what the documentation gets.
func (r *report) Page() string { return string(r.page()) }
