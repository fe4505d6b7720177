package client

// ReadEvents is the reader of server-sent events.
var ReadEvents = readEvents
