package manifest

import (
	"bytes"
	"errors"
	"io"
	"math/big"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// readYAML reads every document of a YAML file.
func readYAML(p *problems, data []byte) []*node {
	if !utf8.Valid(data) {
		p.add(0, "", "is not UTF-8: save it in that encoding")
		return nil
	}
	var all []*node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			line, text := yamlError(err)
			p.add(line, "", "%s", text)
			return nil
		}
		if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
			continue
		}
		if n := doc.Content[0]; n.Kind != yaml.ScalarNode || n.ShortTag() != "!!null" {
			all = append(all, yamlNode(p, n, MaxDepth))
		}
	}
}

// yamlNode converts a value. Only what JSON has too is let through.
func yamlNode(p *problems, y *yaml.Node, depth int) *node {
	n := &node{line: y.Line}
	switch {
	case y.Kind == yaml.AliasNode || y.Anchor != "":
		p.add(y.Line, "", "there are no anchors and aliases: write the value out")
	case depth < 0:
		p.add(y.Line, "", "nested deeper than %d", MaxDepth)
	case y.Kind == yaml.SequenceNode:
		n.kind = nodeArray
		for _, item := range y.Content {
			n.items = append(n.items, yamlNode(p, item, depth-1))
		}
	case y.Kind == yaml.MappingNode:
		n.kind = nodeObject
		for i := 0; i+1 < len(y.Content); i += 2 {
			key := y.Content[i]
			switch {
			case key.ShortTag() == "!!merge":
				p.add(key.Line, "", "there are no merge keys: write the fields out")
				continue
			case key.Kind != yaml.ScalarNode || key.Anchor != "":
				p.add(key.Line, "", "the name of a field must be a text")
				continue
			}
			v := yamlNode(p, y.Content[i+1], depth-1)
			v.line = key.Line
			n.set(key.Value, v)
		}
	case y.Kind == yaml.ScalarNode:
		yamlScalar(p, y, n)
	default:
		p.add(y.Line, "", "cannot be read as YAML")
	}
	return n
}

func yamlScalar(p *problems, y *yaml.Node, n *node) {
	n.kind, n.text = nodeString, y.Value
	switch y.ShortTag() {
	case "!!str", "!!timestamp":
	case "!!null":
		n.kind = nodeNull
	case "!!bool":
		n.kind, n.text = nodeBool, strings.ToLower(y.Value)
		if n.text != "true" && n.text != "false" {
			p.add(y.Line, "", "%q: write true or false, or a text in quotes", y.Value)
		}
	case "!!int":
		v, ok := new(big.Int).SetString(strings.TrimPrefix(y.Value, "+"), 0)
		if !ok || v.BitLen() > 64 {
			p.add(y.Line, "", "%s: the number is out of range", y.Value)
			return
		}
		n.kind, n.text = nodeNumber, v.String()
	case "!!float":
		v, err := strconv.ParseFloat(strings.ReplaceAll(y.Value, "_", ""), 64)
		text := strconv.FormatFloat(v, 'g', -1, 64)
		if err != nil || v-v != 0 { // infinity and NaN
			p.add(y.Line, "", "%s: the number is out of range", y.Value)
			return
		}
		n.kind, n.text = nodeNumber, text
	default:
		p.add(y.Line, "", "there are no tags: remove %s", y.Tag)
	}
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:unmarshal errors:\s*)?(?:line ([0-9]+): )?(.*)$`)

// yamlError takes the line out of an error of the YAML parser.
func yamlError(err error) (int, string) {
	m := yamlLine.FindStringSubmatch(strings.ReplaceAll(err.Error(), "\n", " "))
	if m == nil {
		return 0, err.Error()
	}
	line, convErr := strconv.Atoi(m[1])
	if convErr != nil {
		line = 1 // the parser counts from 0 and does not name that line
	}
	return line, "cannot be read as YAML: " + m[2]
}
