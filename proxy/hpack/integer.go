package hpack

// appendInt appends an integer whose first byte has n bits of it below the
// bits of kind (RFC 7541 section 5.1).
func appendInt(dst []byte, kind byte, n uint, v uint32) []byte {
	top := uint32(1)<<n - 1
	if v < top {
		return append(dst, kind|byte(v)) //nolint:gosec // compared above
	}
	dst = append(dst, kind|byte(top)) //nolint:gosec // n is at most 7
	for v -= top; v >= 0x80; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}

// readInt reads an integer of n bits in the first byte of b, which is not
// empty. What needs more than five further bytes or 32 bits is refused: no
// number that means anything here is that large.
func readInt(b []byte, n uint) (v uint32, rest []byte, err error) {
	top := uint32(1)<<n - 1
	v = uint32(b[0]) & top
	b = b[1:]
	if v < top {
		return v, b, nil
	}
	sum := uint64(v)
	for shift := uint(0); shift < 35; shift += 7 {
		if len(b) == 0 {
			return 0, nil, ErrTruncated
		}
		c := b[0]
		b = b[1:]
		sum += uint64(c&0x7f) << shift
		if c < 0x80 {
			if sum > 1<<32-1 {
				return 0, nil, ErrInteger
			}
			return uint32(sum), b, nil
		}
	}
	return 0, nil, ErrInteger
}
