package main

// NewServerService is for tests of package main_test.
var NewServerService = newServerService
