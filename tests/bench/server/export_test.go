package main

// For tests of package main_test.
var (
	Bars  = (*report).bars
	Parse = parse
)

type (
	Report   = report
	Writes   = writes
	Recovery = recovery
	Overload = overload
)

// Line is a bar as the table shows it.
func (b bar) Line() [4]string { return [4]string{b.what, b.figure(), b.bar(), string(b.verdict())} }

// Page is what the documentation gets.
func (r *report) Page() string { return string(r.page()) }
