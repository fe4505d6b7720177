package hpack

import (
	"encoding/binary"
	"slices"
)

// eos is the symbol that ends strings and must not occur in them.
const eos = 256

// huffmanLengths has the number of bits of each symbol's code, from RFC 7541
// appendix B. The code is canonical (codes of one length are consecutive, in
// the order of their symbols), so the lengths are the code.
//
//nolint:gochecknoglobals // a constant table
var huffmanLengths = [eos + 1]uint8{
	13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
	28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
	6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
	5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
	13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
	7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
	15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
	6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
	20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
	24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
	22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
	21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
	26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
	19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
	20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
	26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
	30,
}

const longestCode = 30

// huffmanCode is the code in the forms that both directions want.
type huffmanCode struct {
	code [eos + 1]uint32
	// fast maps the next eight bits to length<<8 | symbol, if the code is that
	// short; all common symbols are.
	fast [256]uint16
	// Of each length: the first code, how many there are, and where their
	// symbols begin in order.
	first, count, start [longestCode + 1]uint32
	order               [eos + 1]uint16
}

//nolint:gochecknoglobals // a constant table
var huffman = buildHuffman()

func buildHuffman() *huffmanCode {
	h := &huffmanCode{}
	code, at := uint32(0), uint32(0)
	for bits := uint8(1); bits <= longestCode; bits++ {
		code <<= 1
		h.first[bits], h.start[bits] = code, at
		for sym, length := range huffmanLengths {
			if length != bits {
				continue
			}
			h.code[sym] = code
			h.order[at] = uint16(sym)
			if bits <= 8 {
				low := code << (8 - bits)
				for i := range uint32(1) << (8 - bits) {
					h.fast[low+i] = uint16(bits)<<8 | uint16(sym)
				}
			}
			code++
			at++
			h.count[bits]++
		}
	}
	return h
}

// huffmanSize returns how many bytes s has when encoded.
func huffmanSize(s []byte) int {
	bits := 0
	for _, c := range s {
		bits += int(huffmanLengths[c])
	}
	return (bits + 7) / 8
}

// appendHuffman appends s encoded.
func appendHuffman(dst, s []byte) []byte {
	var acc uint64 // its lowest n bits are pending
	n := uint(0)
	for _, c := range s {
		bits := uint(huffmanLengths[c])
		acc = acc<<bits | uint64(huffman.code[c])
		if n += bits; n >= 32 {
			n -= 32
			dst = binary.BigEndian.AppendUint32(dst, uint32(acc>>n)) //nolint:gosec // the bits above were written
		}
	}
	if n%8 != 0 { // the padding is the beginning of EOS
		pad := 8 - n%8
		acc = acc<<pad | (1<<pad - 1)
		n += pad
	}
	for n > 0 {
		n -= 8
		dst = append(dst, byte(acc>>n)) //nolint:gosec // the bits above were written
	}
	return dst
}

// decodeHuffman appends the string that src encodes. If it has more than room
// bytes, fits is false and the rest was not looked at.
func decodeHuffman(dst, src []byte, room int) (out []byte, fits bool, err error) {
	// No code has fewer than five bits.
	most := min(len(src)*8/5, room)
	dst = slices.Grow(dst, most)
	w, end := len(dst), len(dst)+most
	dst = dst[:end]
	// The highest n bits of acc are pending. Behind them there may be bits of
	// src[0] already, which are or-ed in again later.
	var acc uint64
	n := uint(0)
	for {
		if n < longestCode {
			if len(src) >= 8 {
				acc |= binary.BigEndian.Uint64(src) >> n
				whole := (63 - n) / 8
				n += 8 * whole
				src = src[whole:]
			}
			for n <= 56 && len(src) > 0 {
				acc |= uint64(src[0]) << (56 - n)
				n += 8
				src = src[1:]
			}
		}
		e := huffman.fast[acc>>56]
		bits, sym := uint(e>>8), e&0xff
		if bits == 0 {
			bits, sym = longCode(acc)
		}
		if bits > n {
			break
		}
		if sym == eos {
			return dst[:w], true, ErrHuffman
		}
		if w == end {
			return dst[:w], false, nil
		}
		dst[w] = byte(sym)
		w++
		acc <<= bits
		n -= bits
	}
	// What is left is padding: less than a byte, all ones.
	if n > 7 || acc>>(64-n) != 1<<n-1 {
		return dst[:w], true, ErrHuffman
	}
	return dst[:w], true, nil
}

// longCode finds the code of more than eight bits that acc begins with. The
// code is complete, so there always is one.
func longCode(acc uint64) (bits uint, sym uint16) {
	for bits = 9; bits < longestCode; bits++ {
		if i := uint32(acc>>(64-bits)) - huffman.first[bits]; i < huffman.count[bits] { //nolint:gosec // bits are at most 30
			return bits, huffman.order[huffman.start[bits]+i]
		}
	}
	i := uint32(acc>>(64-bits)) - huffman.first[bits] //nolint:gosec // 30 bits
	return bits, huffman.order[huffman.start[bits]+i]
}
