package dataplane

// AppendMember is for tests that hold it against encoding/json.
func AppendMember(b []byte, name string, value []byte) []byte { return appendMember(b, name, value) }
