package hpack_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	xhpack "golang.org/x/net/http2/hpack"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
)

// theirs decodes with golang.org/x/net/http2/hpack.
func theirs(x *xhpack.Decoder, b []byte) ([]string, error) {
	var list []string
	x.SetEmitFunc(func(f xhpack.HeaderField) {
		line := f.Name + ": " + f.Value
		if f.Sensitive {
			line += " (never indexed)"
		}
		list = append(list, line)
	})
	if _, err := x.Write(b); err != nil {
		return list, err
	}
	return list, x.Close()
}

// Any two blocks of a connection mean to this decoder what they mean to the one of
// golang.org/x/net, but for integers of more than 32 bits or five bytes, which are
// refused here and mean something there, and for size updates: while its table is empty
// it takes them anywhere, and while it is not, one per block.
func FuzzDecoder(f *testing.F) {
	for _, seed := range []string{
		"8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", "3fe1 1f20 82",
		"1008 7061 7373 776f 7264 0673 6563 7265 74", "4025 a849 e95b a97d 7f89 25a8 49e9 5bb8 e8b4 bf be 7e 01 61 bf", "7fff ff0f",
	} {
		f.Add(unhexed(seed), unhexed("be bf c0"))
	}
	big := hpack.Limits{ListSize: 1 << 24, Fields: 1 << 20}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		d, small := hpack.NewDecoder(), hpack.NewDecoder()
		x := xhpack.NewDecoder(4096, nil)
		for _, b := range [][]byte{first, second} {
			got, err := decode(t, d, b, big)
			want, xerr := theirs(x, b)
			// With little room the verdict on compression may be milder, as strings
			// that fit nowhere are not looked at, and never stricter.
			part, lerr := decode(t, small, b, hpack.Limits{ListSize: 100, Fields: 3})
			if errors.Is(lerr, hpack.ErrCompression) && err == nil {
				t.Fatalf("with limits %v, without nil", lerr)
			}
			if lerr == nil && err == nil && !cmp.Equal(part, got) {
				t.Fatalf("with limits %q, without %q", part, got)
			}
			resized := xerr != nil && strings.Contains(xerr.Error(), "dynamic table size update MUST occur")
			if errors.Is(err, hpack.ErrInteger) || errors.Is(err, hpack.ErrTableSize) || resized {
				return
			}
			if (err == nil) != (xerr == nil) {
				t.Fatalf("error is %v, theirs %v", err, xerr)
			}
			if err != nil {
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("(-theirs +own):\n%s", diff)
			}
		}
	})
}

// Whatever is encoded, in blocks with changes of the table's size between them,
// comes out of both decoders as it went in.
func FuzzEncoder(f *testing.F) {
	f.Add([]byte("\x02ab\x01c\x02ab\x01c\x02ab\x01c\xff\x00\x02ab\x01c\xfe\x02ab\x01d"))
	f.Add([]byte("\x05:path\x01/\x0dauthorization\x01x\x06cookie\x03a=b\xfe\x05:path\x02/x\xff\x40\x05:path\x02/x\xfe\x05:path\x02/x"))
	f.Fuzz(func(t *testing.T, script []byte) {
		e, d := hpack.NewEncoder(4096), hpack.NewDecoder()
		x := xhpack.NewDecoder(4096, nil)
		take := func() []byte {
			if len(script) == 0 {
				return nil
			}
			n := min(int(script[0]), len(script)-1)
			s := script[1 : 1+n]
			script = script[1+n:]
			return s
		}
		b := e.Begin(nil)
		var want []string
		flush := func() {
			got, err := decode(t, d, b, hpack.Limits{ListSize: 1 << 24, Fields: 1 << 20})
			list, xerr := theirs(x, b)
			if err != nil || xerr != nil {
				t.Fatalf("own decoder %v, theirs %v", err, xerr)
			}
			if !cmp.Equal(got, list) {
				t.Fatalf("own decoder %q, theirs %q", got, list)
			}
			for i := range got {
				got[i] = string(bytes.TrimSuffix([]byte(got[i]), []byte(" (never indexed)")))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
			b, want = e.Begin(nil), nil
		}
		for len(script) > 0 {
			switch script[0] {
			case 0xff:
				flush()
				limit := uint32(0)
				if len(script) > 1 {
					limit = uint32(script[1]) << 4
				}
				script = script[min(2, len(script)):]
				e.SetLimit(limit)
				b = e.Begin(b)
			case 0xfe:
				script = script[1:]
				flush()
			default:
				name, value := take(), take()
				b = e.Field(b, &http1.Field{Name: name, Value: value})
				want = append(want, string(lowered(name))+": "+string(value))
			}
		}
		flush()
	})
}

func lowered(name []byte) []byte {
	out := bytes.Clone(name)
	for i, c := range out {
		if 'A' <= c && c <= 'Z' {
			out[i] |= 0x20
		}
	}
	return out
}
