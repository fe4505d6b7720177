package hpack_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
)

// encode encodes "name: value" lines as one block.
func encode(e *hpack.Encoder, lines ...string) []byte {
	b := e.Begin(nil)
	for _, line := range lines {
		b = encodeLine(e, b, line)
	}
	return b
}

func encodeLine(e *hpack.Encoder, b []byte, line string) []byte {
	name, value, _ := strings.Cut(line, ": ")
	pseudos := map[string]hpack.Pseudo{
		":method": hpack.Method, ":path": hpack.Path, ":scheme": hpack.Scheme,
		":authority": hpack.Authority, ":status": hpack.Status, ":protocol": hpack.Protocol,
	}
	if p, ok := pseudos[name]; ok {
		return e.Pseudo(b, p, []byte(value))
	}
	return e.Field(b, &http1.Field{Name: []byte(name), Value: []byte(value)})
}

// What is sent once is sent as a literal, the second time it enters the table,
// from the third time on it is a byte.
func TestEncoderIndexesWhatRepeats(t *testing.T) {
	t.Parallel()
	e := hpack.NewEncoder(4096)
	sizes := make([]int, 4)
	for i := range sizes {
		sizes[i] = len(encode(e, ":method: GET", ":scheme: https", ":path: /shop.Cart/Add", "user-agent: grpc-go/1.85.0"))
	}
	if sizes[0] < 20 || sizes[1] < 20 || sizes[2] != 4 || sizes[3] != 4 {
		t.Errorf("blocks have %v bytes, want two long ones and then 4", sizes)
	}
}

func TestEncoderNeverIndexes(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("c", 40)
	for _, c := range []struct {
		field http1.Field
		never bool
	}{
		{http1.Field{Name: []byte("authorization"), Value: []byte("Bearer " + long)}, true},
		{http1.Field{Name: []byte("Proxy-Authorization"), Value: []byte("Basic x")}, true},
		{http1.Field{Name: []byte("cookie"), Value: []byte("a=1")}, true},
		{http1.Field{Name: []byte("Set-Cookie"), Value: []byte("a=1")}, true},
		{http1.Field{Name: []byte("cookie"), Value: []byte(long)}, false},
		{http1.Field{Name: []byte("x-token"), Value: []byte("t"), Sensitive: true}, true},
		{http1.Field{Name: []byte("accept-encoding"), Value: []byte("gzip, deflate"), Sensitive: true}, true},
		{http1.Field{Name: []byte("x-token"), Value: []byte("t")}, false},
	} {
		e, d := hpack.NewEncoder(4096), hpack.NewDecoder()
		for range 4 {
			got, err := decode(t, d, e.Field(e.Begin(nil), &c.field), hpack.Limits{})
			want := strings.ToLower(string(c.field.Name)) + ": " + string(c.field.Value)
			if c.never {
				want += " (never indexed)"
			}
			if err != nil || len(got) != 1 || got[0] != want {
				t.Errorf("got %q and %v, want %q", got, err, want)
			}
		}
	}
}

// A literal is in Huffman code only where that is shorter.
func TestEncoderHuffman(t *testing.T) {
	t.Parallel()
	e := hpack.NewEncoder(4096)
	for value, want := range map[string]int{"aaaaaaaa": 5, "~~~~~~~~": 8, "\xff\xff": 2} {
		b := e.Literal(e.Begin(nil), "x", []byte(value))
		if got := len(b) - 4; got != want { // kind, name of one byte with its length, the value's length
			t.Errorf("%q has %d bytes, want %d", value, got, want)
		}
	}
}

func TestEncoderSetLimit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		bound  uint32
		limits []uint32
		want   []byte
	}{
		"as it begins":              {4096, nil, nil},
		"as it is":                  {4096, []uint32{4096}, nil},
		"larger than the bound":     {4096, []uint32{1 << 30}, nil},
		"smaller":                   {4096, []uint32{30}, []byte{0x3e}},
		"none and again":            {4096, []uint32{0, 4096}, []byte{0x20, 0x3f, 0xe1, 0x1f}},
		"smaller, then larger":      {4096, []uint32{100, 10, 4096, 20}, []byte{0x20, 0x34}},
		"a bound below the initial": {30, nil, []byte{0x3e}},
		"a bound above the initial": {8192, []uint32{1 << 30}, []byte{0x3f, 0xe1, 0x3f}},
	} {
		e := hpack.NewEncoder(c.bound)
		for _, n := range c.limits {
			e.SetLimit(n)
		}
		if got := e.Begin(nil); !bytes.Equal(got, c.want) {
			t.Errorf("%s: block begins with % x, want % x", name, got, c.want)
		}
		if got := e.Begin(nil); len(got) != 0 {
			t.Errorf("%s: the next block begins with % x", name, got)
		}
	}
}

// Thousands of blocks with what a proxy sees, changes of the table's size among
// them, come out of two decoders as they went in.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	e, d := hpack.NewEncoder(4096), hpack.NewDecoder()
	x := xhpack.NewDecoder(4096, nil)
	total := 0
	for i := range 3000 {
		switch i % 500 {
		case 100:
			e.SetLimit(uint32(i % 7 * 100))
		case 150:
			e.SetLimit(10)
			e.SetLimit(1000)
		case 200:
			e.SetLimit(4096)
		}
		want := []string{
			":method: POST", ":scheme: https", ":authority: cart.default.mesh", fmt.Sprintf(":path: /carts/%d?x=%d", i, i*i),
			"user-agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101", "accept: */*",
			fmt.Sprintf("x-request-id: %016x-%d", i*7919, i), fmt.Sprintf("x-tenant: tenant-%d", i%37),
			"content-type: application/json", fmt.Sprintf("content-length: %d", i%11),
			"cookie: " + strings.Repeat("session", i%100), "x-long: " + strings.Repeat("l", i),
			"x-" + strings.Repeat("n", i%90) + ": v", "grpc-timeout: 1S", "te: trailers", "x-bytes: \xc3\xa9\xff",
		}
		b := encode(e, want...)
		total += len(b)
		var list []string
		x.SetEmitFunc(func(f xhpack.HeaderField) { list = append(list, f.Name+": "+f.Value) })
		if _, err := x.Write(b); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if err := x.Close(); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if diff := cmp.Diff(want, list); diff != "" {
			t.Fatalf("block %d, their decoder (-want +got):\n%s", i, diff)
		}
		got, err := decode(t, d, b, hpack.Limits{})
		if err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		for k := range got {
			got[k] = strings.TrimSuffix(got[k], " (never indexed)")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("block %d (-want +got):\n%s", i, diff)
		}
	}
	t.Logf("%d bytes per block", total/3000)
}

// The codec costs no memory once its tables are there.
func TestNoAllocations(t *testing.T) {
	e, d := hpack.NewEncoder(4096), hpack.NewDecoder()
	fields := browser()
	block, arena := make([]byte, 0, 4096), make([]byte, 0, 4096)
	var f hpack.Field
	n := 0
	if got := testing.AllocsPerRun(2000, func() {
		n++
		block = e.Pseudo(e.Begin(block[:0]), hpack.Method, []byte("GET"))
		block = e.Length(e.Status(block, 200+n%50), int64(n))
		for i := range fields {
			block = e.Field(block, &fields[i])
		}
		block = e.Literal(block, "x-request-id", block[:12])
		d.Begin(block, arena[:0], hpack.Limits{})
		for d.Next(&f) {
		}
		var err error
		if arena, err = d.End(); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("%v allocations per block, want none", got)
	}
}

func browser() http1.Fields {
	var fields http1.Fields
	for _, line := range []string{
		"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "Accept-Encoding: gzip, deflate, br, zstd",
		"Accept-Language: de,en-US;q=0.7,en;q=0.3", "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark", "Referer: https://shop.example/cart", "X-Forwarded-For: 203.0.113.7",
		"Sec-Fetch-Mode: navigate",
	} {
		name, value, _ := strings.Cut(line, ": ")
		fields.Add([]byte(name), []byte(value))
	}
	return fields
}

// The benchmarks are a request of a browser with a path of its own; theirs is
// golang.org/x/net/http2/hpack.
func BenchmarkEncode(b *testing.B) {
	fields := browser()
	paths := make([][]byte, 1024)
	for i := range paths {
		paths[i] = fmt.Appendf(nil, "/products/%d/reviews?page=%d", i*7919, i%10)
	}
	b.Run("own", func(b *testing.B) {
		e := hpack.NewEncoder(4096)
		block := make([]byte, 0, 4096)
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			block = e.Pseudo(e.Begin(block[:0]), hpack.Method, []byte("GET"))
			block = e.Pseudo(block, hpack.Scheme, []byte("https"))
			block = e.Pseudo(block, hpack.Authority, []byte("shop.default.mesh"))
			block = e.Pseudo(block, hpack.Path, paths[i%len(paths)])
			for k := range fields {
				block = e.Field(block, &fields[k])
			}
		}
		b.ReportMetric(float64(len(block)), "bytes/block")
	})
	b.Run("theirs", func(b *testing.B) {
		var out bytes.Buffer
		e := xhpack.NewEncoder(&out)
		names := make([]string, len(fields))
		for k := range fields {
			names[k] = strings.ToLower(string(fields[k].Name))
		}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			out.Reset()
			for _, f := range [4]xhpack.HeaderField{
				{Name: ":method", Value: "GET"},
				{Name: ":scheme", Value: "https"},
				{Name: ":authority", Value: "shop.default.mesh"},
				{Name: ":path", Value: string(paths[i%len(paths)])},
			} {
				if err := e.WriteField(f); err != nil {
					b.Fatal(err)
				}
			}
			for k := range fields {
				if err := e.WriteField(xhpack.HeaderField{Name: names[k], Value: string(fields[k].Value)}); err != nil {
					b.Fatal(err)
				}
			}
		}
		b.ReportMetric(float64(out.Len()), "bytes/block")
	})
}

func BenchmarkDecode(b *testing.B) {
	fields := browser()
	e := hpack.NewEncoder(4096)
	var blocks [][]byte
	for i := range 1024 {
		block := e.Pseudo(e.Begin(nil), hpack.Method, []byte("GET"))
		block = e.Pseudo(block, hpack.Path, fmt.Appendf(nil, "/products/%d/reviews?page=%d", i*7919, i%10))
		for k := range fields {
			block = e.Field(block, &fields[k])
		}
		blocks = append(blocks, block)
	}
	b.Run("own", func(b *testing.B) {
		d := hpack.NewDecoder()
		arena := make([]byte, 0, 4096)
		var f hpack.Field
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i%len(blocks) == 0 {
				d = hpack.NewDecoder()
			}
			d.Begin(blocks[i%len(blocks)], arena[:0], hpack.Limits{})
			for d.Next(&f) {
			}
			if _, err := d.End(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("theirs", func(b *testing.B) {
		d := xhpack.NewDecoder(4096, func(xhpack.HeaderField) {})
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i%len(blocks) == 0 {
				d = xhpack.NewDecoder(4096, func(xhpack.HeaderField) {})
			}
			if _, err := d.Write(blocks[i%len(blocks)]); err != nil {
				b.Fatal(err)
			}
			if err := d.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
