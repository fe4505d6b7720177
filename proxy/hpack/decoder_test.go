package hpack_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
)

// raw appends a literal that enters the table, without Huffman code.
func raw(dst []byte, name, value string) []byte {
	dst = append(dst, 0x40)
	for _, s := range []string{name, value} {
		if n := len(s); n < 127 {
			dst = append(dst, byte(n))
		} else {
			dst = append(dst, 127)
			for n -= 127; n >= 128; n >>= 7 {
				dst = append(dst, byte(n)|0x80)
			}
			dst = append(dst, byte(n))
		}
		dst = append(dst, s...)
	}
	return dst
}

func TestDecoderRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		hex  string
		want error
	}{
		"index 0":                          {"80", hpack.ErrIndex},
		"index behind the static table":    {"be", hpack.ErrIndex},
		"name index outside":               {"7f00 0161", hpack.ErrIndex},
		"largest index":                    {"ffff ffff ff0f", hpack.ErrInteger},
		"integer above 32 bits":            {"ff80 ffff ffff 0f", hpack.ErrInteger},
		"integer of six bytes":             {"ff80 8080 8080 00", hpack.ErrInteger},
		"integer cut off":                  {"ff80", hpack.ErrTruncated},
		"no name":                          {"40", hpack.ErrTruncated},
		"no value":                         {"4001 61", hpack.ErrTruncated},
		"name cut off":                     {"4005 6161", hpack.ErrTruncated},
		"value cut off":                    {"4001 6105 62", hpack.ErrTruncated},
		"huffman: EOS":                     {"4001 6184 ffff ffff", hpack.ErrHuffman},
		"huffman: padding of eight bits":   {"4001 6182 1fff", hpack.ErrHuffman},
		"huffman: padding of zeros":        {"4001 6181 18", hpack.ErrHuffman},
		"huffman: cut in a long code":      {"4001 6182 fffe", hpack.ErrHuffman},
		"size update above the limit":      {"3fe2 1f", hpack.ErrTableSize},
		"size update after a field":        {"82 20", hpack.ErrTableSize},
		"index behind the dynamic table":   {"4001 6101 62 be 4001 6301 64 bf c0", hpack.ErrIndex},
		"entry gone with a size of nought": {"20 4001 6101 62 be", hpack.ErrIndex},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := hpack.NewDecoder()
			_, err := decode(t, d, unhex(t, c.hex), hpack.Limits{})
			if !errors.Is(err, c.want) || !errors.Is(err, hpack.ErrCompression) {
				t.Fatalf("error is %v, want %v", err, c.want)
			}
			if _, err := decode(t, d, unhex(t, "82"), hpack.Limits{}); !errors.Is(err, c.want) {
				t.Errorf("a later block: error is %v, want that it stays", err)
			}
		})
	}
}

// A peer that was told to use a smaller table must say that it does.
func TestDecoderSetLimit(t *testing.T) {
	t.Parallel()
	d := hpack.NewDecoder()
	d.SetLimit(100)
	if _, err := decode(t, d, unhex(t, "3f45 82"), hpack.Limits{}); err != nil {
		t.Fatalf("an update to the limit: %v", err)
	}
	if _, err := decode(t, d, unhex(t, "82"), hpack.Limits{}); err != nil {
		t.Fatalf("a block after it: %v", err)
	}
	d.SetLimit(50)
	if _, err := decode(t, d, unhex(t, "82"), hpack.Limits{}); !errors.Is(err, hpack.ErrTableSize) {
		t.Errorf("no update although the limit fell: error is %v", err)
	}
}

func TestDecoderDescribes(t *testing.T) {
	t.Parallel()
	type seen struct {
		ID     http1.Known
		Pseudo hpack.Pseudo
		Flaw   hpack.Flaw
	}
	for _, c := range []struct {
		name, value string
		want        seen
	}{
		{":path", "/x", seen{Pseudo: hpack.Path}},
		{":protocol", "websocket", seen{Pseudo: hpack.Protocol}},
		{":other", "x", seen{Pseudo: hpack.PseudoUnknown}},
		{":", "x", seen{Pseudo: hpack.PseudoUnknown}},
		{":Path", "/", seen{Pseudo: hpack.PseudoUnknown}},
		{":path", "/\n", seen{Pseudo: hpack.Path, Flaw: hpack.BadValue}},
		{"content-type", "a/b", seen{ID: http1.ContentType}},
		{"mesh-error", "x", seen{ID: http1.MeshHeader}},
		{"connection", "close", seen{ID: http1.Connection}},
		{"", "x", seen{Flaw: hpack.BadName}},
		{"Content-Type", "a/b", seen{ID: http1.ContentType, Flaw: hpack.BadName}},
		{"a b", "x", seen{Flaw: hpack.BadName}},
		{"a:b", "x", seen{Flaw: hpack.BadName}},
		{"\xe9", "x", seen{Flaw: hpack.BadName}},
		{"a_b", "x", seen{Flaw: hpack.Underscore}},
		{"a_b", "x ", seen{Flaw: hpack.BadValue}},
		{"a_\x00", "x\r", seen{Flaw: hpack.BadName}},
		{"a", "x\r\ny: z", seen{Flaw: hpack.BadValue}},
		{"a", "12345678\x00", seen{Flaw: hpack.BadValue}},
		{"a", "1234\x7f678", seen{Flaw: hpack.BadValue}},
		{"a", " x", seen{Flaw: hpack.BadValue}},
		{"a", "\tx", seen{Flaw: hpack.BadValue}},
		{"a", "x\t", seen{Flaw: hpack.BadValue}},
		{"a", "x\ty \xe9\xff", seen{}},
		{"a", "", seen{}},
	} {
		d := hpack.NewDecoder()
		// Once as a literal, once from the table, once with the table's name.
		b := append(raw(nil, c.name, c.value), 0xbe, 0x7e, 1, 'v')
		d.Begin(b, nil, hpack.Limits{})
		var f hpack.Field
		for i := 0; d.Next(&f); i++ {
			want := c.want
			if i == 2 && want.Flaw == hpack.BadValue {
				want.Flaw = hpack.NoFlaw
				if strings.Contains(c.name, "_") {
					want.Flaw = hpack.Underscore
				}
			}
			if got := (seen{f.ID, f.Pseudo, f.Flaw}); got != want {
				t.Errorf("%q: %q, field %d: %+v, want %+v", c.name, c.value, i, got, want)
			}
		}
		if _, err := d.End(); err != nil {
			t.Errorf("%q: %q: %v", c.name, c.value, err)
		}
	}
}

// A list over the limit refuses its stream only: what the same block did to the
// table holds for the next one.
func TestDecoderLimits(t *testing.T) {
	t.Parallel()
	huge := strings.Repeat("h", 5000)
	for name, c := range map[string]struct {
		limits hpack.Limits
		block  []byte
		given  int
		next   string // hex
		want   []string
	}{
		"size": {
			hpack.Limits{ListSize: 80},
			raw(raw(raw(nil, "a", "1"), "b", "2"), "c", "3"), 2,
			"be bf c0",
			[]string{"c: 3", "b: 2", "a: 1"},
		},
		"fields": {
			hpack.Limits{Fields: 1},
			raw(raw(nil, "a", "1"), "b", "2"), 1,
			"be bf",
			[]string{"b: 2", "a: 1"},
		},
		"fields of the static table": {hpack.Limits{Fields: 3}, unhexed("8282 8282 82"), 3, "82", []string{":method: GET"}},
		"an entry above list and table empties the table": {
			hpack.Limits{ListSize: 1000},
			raw(raw(raw(nil, "a", "1"), "b", huge), "c", "3"), 1,
			"be",
			[]string{"c: 3"},
		},
		"an entry above the list, not the table": {
			hpack.Limits{ListSize: 100},
			raw(raw(nil, "a", "1"), "b", huge[:300]), 1,
			"be",
			[]string{"b: " + huge[:300]},
		},
		"a name above list and table": {
			hpack.Limits{ListSize: 1000},
			raw(raw(nil, huge, huge), "c", "3"), 0,
			"be",
			[]string{"c: 3"},
		},
		"a name of the table above the list": {
			hpack.Limits{ListSize: 100},
			append(raw(raw(nil, huge[:100], "1"), "c", "3"), 0x0f, 0x30, 0x01, 0x32), 0,
			"be",
			[]string{"c: 3"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := hpack.NewDecoder()
			got, err := decode(t, d, c.block, c.limits)
			if !errors.Is(err, hpack.ErrListTooLarge) || errors.Is(err, hpack.ErrCompression) || len(got) != c.given {
				t.Fatalf("%d fields and error %v, want %d and ErrListTooLarge", len(got), err, c.given)
			}
			got, err = decode(t, d, unhex(t, c.next), hpack.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("the next block (-want +got):\n%s", diff)
			}
		})
	}
}

func unhexed(s string) []byte {
	var b []byte
	for h := range strings.FieldsSeq(s) {
		for i := 0; i < len(h); i += 2 {
			b = append(b, byte(strings.IndexByte("0123456789abcdef", h[i])<<4|strings.IndexByte("0123456789abcdef", h[i+1])))
		}
	}
	return b
}

// A caller may stop early. The table is right nevertheless.
func TestDecoderEndWalksOn(t *testing.T) {
	t.Parallel()
	d := hpack.NewDecoder()
	d.Begin(raw(raw(nil, "a", "1"), "b", "2"), nil, hpack.Limits{})
	if _, err := d.End(); err != nil {
		t.Fatal(err)
	}
	got, err := decode(t, d, unhexed("be bf"), hpack.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"b: 2", "a: 1"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A name may come from the very entry that its field evicts (RFC 7541 section
// 4.4), and views outlive the table's entries, the block and a grown arena.
func TestDecoderViews(t *testing.T) {
	t.Parallel()
	d := hpack.NewDecoder()
	long := strings.Repeat("v", 3000)
	b := append(raw(nil, "name", long), 0x7e) // index 62 names it
	b = append(b, raw(nil, "", strings.Repeat("w", 2000))[2:]...)
	d.Begin(b, make([]byte, 0, 16), hpack.Limits{})
	var list []hpack.Field
	var f hpack.Field
	for d.Next(&f) {
		list = append(list, f)
	}
	if _, err := d.End(); err != nil {
		t.Fatal(err)
	}
	clear(b)
	if _, err := decode(t, d, raw(nil, "x", strings.Repeat("y", 4000)), hpack.Limits{}); err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || string(list[0].Name) != "name" || string(list[1].Name) != "name" ||
		string(list[0].Value) != long || !bytes.Equal(list[1].Value, bytes.Repeat([]byte("w"), 2000)) {
		t.Errorf("views changed")
	}
}

// A block that asks for much costs what it weighs: here 64 KiB that stand for
// 256 MiB.
func TestDecoderBomb(t *testing.T) {
	t.Parallel()
	d := hpack.NewDecoder()
	if _, err := decode(t, d, raw(nil, "bomb", strings.Repeat("b", 4000)), hpack.Limits{}); err != nil {
		t.Fatal(err)
	}
	d.Begin(bytes.Repeat([]byte{0xbe}, 64<<10), nil, hpack.Limits{})
	var f hpack.Field
	n := 0
	for d.Next(&f) {
		n++
	}
	arena, err := d.End()
	if n != 8 || !errors.Is(err, hpack.ErrListTooLarge) || cap(arena) > 96<<10 {
		t.Errorf("%d fields, error %v, %d bytes held", n, err, cap(arena))
	}
	if got, err := decode(t, d, unhexed("be"), hpack.Limits{}); err != nil || len(got) != 1 {
		t.Errorf("the next block: %d fields, %v", len(got), err)
	}
}
