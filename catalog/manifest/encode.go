package manifest

import (
	"fmt"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.yaml.in/yaml/v3"
)

// EncodeJSON returns the resource as one JSON object that starts with its kind
// and that Load reads back: fields in the order of the struct, maps sorted, no
// defaults added.
func EncodeJSON(r Resource) ([]byte, error) {
	n, err := resourceNode(r)
	if err != nil {
		return nil, err
	}
	return n.appendJSON(nil), nil
}

// EncodeYAML returns the resources as a YAML stream of one document each, that
// Load reads back.
func EncodeYAML(resources ...Resource) ([]byte, error) {
	var out []byte
	for i, r := range resources {
		n, err := resourceNode(r)
		if err != nil {
			return nil, err
		}
		text, err := yaml.Marshal(n.yaml())
		if err != nil {
			return nil, fmt.Errorf("writing %s %s as YAML: %w", r.Kind, r.Name(), err)
		}
		if i > 0 {
			out = append(out, "---\n"...)
		}
		out = append(out, text...)
	}
	return out, nil
}

// YAML returns any value that encodes as JSON in YAML, its fields in the same
// order.
func YAML(v any) ([]byte, error) {
	n, err := valueNode(v)
	if err != nil {
		return nil, err
	}
	text, err := yaml.Marshal(n.yaml())
	if err != nil {
		return nil, fmt.Errorf("writing %T as YAML: %w", v, err)
	}
	return text, nil
}

func resourceNode(r Resource) (*node, error) {
	v, err := valueNode(r.Value)
	if err != nil {
		return nil, err
	}
	n := &node{kind: nodeObject}
	n.set("kind", &node{kind: nodeString, text: string(r.Kind)})
	for i, name := range v.names {
		n.set(name, v.items[i])
	}
	return n, nil
}

func valueNode(v any) (*node, error) {
	text, err := json.Marshal(v, json.Deterministic(true), jsontext.AllowInvalidUTF8(false))
	if err != nil {
		return nil, fmt.Errorf("writing %T as JSON: %w", v, err)
	}
	p := &problems{}
	n := readJSON(p, text)
	if err := p.err(); err != nil {
		return nil, fmt.Errorf("writing %T: %w", v, err)
	}
	return n, nil
}

// yaml converts the tree. The encoder quotes a text that would else be read as
// something different.
func (n *node) yaml() *yaml.Node {
	y := &yaml.Node{Kind: yaml.ScalarNode, Value: n.text}
	switch n.kind {
	case nodeNull:
		y.Tag, y.Value = "!!null", "null"
	case nodeBool:
		y.Tag = "!!bool"
	case nodeNumber:
		y.Tag = "" // as written
	case nodeString:
		y.Tag = "!!str"
	case nodeArray:
		y.Kind = yaml.SequenceNode
		for _, item := range n.items {
			y.Content = append(y.Content, item.yaml())
		}
	case nodeObject:
		y.Kind = yaml.MappingNode
		for i, name := range n.names {
			y.Content = append(y.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: name}, n.items[i].yaml())
		}
	}
	return y
}
