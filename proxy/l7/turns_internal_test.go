package l7

import "testing"

// TestTurns: reads are preceded by a yield as long as that finds something, ever more rarely while it does not, and at once again
// when it does.
func TestTurns(t *testing.T) {
	var turns turns
	yields := func(reads int, found bool) (n int) {
		for range reads {
			if turns.yield() {
				n++
				turns.found(found)
			}
		}
		return n
	}
	if n := yields(100, true); n != 100 {
		t.Errorf("%d yields before 100 reads that find something, want all", n)
	}
	if n := yields(1+2+4+8+16+32, false); n != 6 {
		t.Errorf("%d yields before 63 reads that find nothing, want 6: each time after twice as many", n)
	}
	if n := yields(320, false); n != 10 {
		t.Errorf("%d yields before 320 more of them, want one in 32", n)
	}
	if n := yields(32+99, true); n != 100 {
		t.Errorf("%d yields once reads find something again, want the next one and all after it", n)
	}
}
