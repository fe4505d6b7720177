package conformance_test

import (
	"math/rand/v2"
	"strings"
)

// mutator makes inputs from the vectors. One seed always gives the same ones.
type mutator struct {
	rand  *rand.Rand
	bases []string
}

func newMutator(seed uint64) *mutator {
	m := &mutator{rand: rand.New(rand.NewPCG(seed, 0x6d657368))}
	for _, v := range vectors() {
		if len(v.raw) < 4<<10 { // what is cut from a long one is mostly filling
			m.bases = append(m.bases, v.raw)
		}
	}
	return m
}

// tokens are what parsers trip over.
func tokens() []string {
	return []string{
		"\r\n", "\n", "\r", " ", "\t", "\x00", ":", ",", ";", "0", "5", "ffff", "\r\n\r\n", "0\r\n\r\n", "chunked", "HTTP/1.1", "HTTP/1.0", "/../", "%2e%2e", "//", "\\", "?", "#", "%",
		"GET ", "POST ", "Host: app\r\n", "Host: other\r\n", "Content-Length: 5\r\n", "Content-Length: 0\r\n", "Content-Length: 60\r\n", "Transfer-Encoding: chunked\r\n",
		"Connection: close\r\n", "Connection: keep-alive, content-length\r\n", "Expect: 100-continue\r\n", "Upgrade: websocket\r\nConnection: upgrade\r\n", smuggled, canary,
		"\xff", "\x0b", "\x7f", "é",
	}
}

func (m *mutator) base() string { return m.bases[m.rand.IntN(len(m.bases))] }

// next returns one input, of one to four steps.
func (m *mutator) next() string {
	s := m.base()
	for range 1 + m.rand.IntN(4) {
		s = m.step(s)
	}
	return s
}

func (m *mutator) step(s string) string {
	at := m.rand.IntN(len(s) + 1)
	all := tokens()
	token := all[m.rand.IntN(len(all))]
	switch m.rand.IntN(7) {
	case 0: // put a token anywhere
		return s[:at] + token + s[at:]
	case 1: // put a token in the place of bytes
		return s[:at] + token + s[min(len(s), at+1+m.rand.IntN(8)):]
	case 2: // lose bytes
		return s[:at] + s[min(len(s), at+1+m.rand.IntN(8)):]
	case 3: // flip a bit
		if at == len(s) {
			return s
		}
		return s[:at] + string([]byte{s[at] ^ 1<<m.rand.IntN(8)}) + s[at+1:]
	case 4: // two lines trade places
		lines := strings.SplitAfter(s, "\r\n")
		i, j := m.rand.IntN(len(lines)), m.rand.IntN(len(lines))
		lines[i], lines[j] = lines[j], lines[i]
		return strings.Join(lines, "")
	case 5: // a line comes twice
		lines := strings.SplitAfter(s, "\r\n")
		i := m.rand.IntN(len(lines))
		return strings.Join(append(lines[:i+1:i+1], lines[i:]...), "")
	default: // the end of another
		other := m.base()
		return s[:at] + other[m.rand.IntN(len(other)+1):]
	}
}
