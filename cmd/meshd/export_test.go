package main

// For tests of package main_test.
var (
	AfterCollection = afterCollection
	GCPercent       = gcPercent
)
