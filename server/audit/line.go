package audit

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
)

// head is the newest record: what the next one is chained to.
type head struct {
	seq uint64
	sum [sha256.Size]byte
}

const (
	macField = `,"mac":"`
	macTail  = len(macField) + 2*sha256.Size + len(`"}`)
	// maxLine bounds what is read as one record; one with 100 changes has less than
	// 64 KiB.
	maxLine = 1 << 20
)

// next returns the line of a record, ended by a line feed, and the head after it.
func (h head) next(r client.AuditRecord, key ca.Secret) ([]byte, head, error) {
	r.Seq, r.Prev, r.MAC = h.seq+1, hex.EncodeToString(h.sum[:]), ""
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(r); err != nil {
		return nil, h, fmt.Errorf("encode a record of the audit log: %w", err)
	}
	line := bytes.TrimSuffix(text.Bytes(), []byte("}\n"))
	line = append(line, macField+hex.EncodeToString(sign(append(bytes.Clone(line), '}'), key))+`"}`...)
	return append(line, '\n'), head{seq: r.Seq, sum: sha256.Sum256(line)}, nil
}

func sign(body []byte, key ca.Secret) []byte {
	mac := hmac.New(sha256.New, key.Reveal())
	mac.Write(body)
	return mac.Sum(nil)
}

// parse reads a line without its line feed.
func parse(line []byte) (client.AuditRecord, error) {
	var r client.AuditRecord
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("it is no record: %w", err)
	}
	if r.Seq == 0 || len(r.Prev) != 2*sha256.Size || r.Event == "" {
		return r, fmt.Errorf("it is no record: it lacks seq, event or prev")
	}
	return r, nil
}

// authentic reports whether the line was written with the key.
func authentic(line []byte, key ca.Secret) bool {
	cut := len(line) - macTail
	if cut < 0 || !strings.HasPrefix(string(line[cut:]), macField) {
		return false
	}
	have, err := hex.DecodeString(string(line[cut+len(macField) : len(line)-2]))
	return err == nil && hmac.Equal(have, sign(append(bytes.Clone(line[:cut]), '}'), key))
}
