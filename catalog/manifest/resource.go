package manifest

import (
	"bytes"
	"errors"
	"reflect"
	"slices"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// A Kind names a kind of resource, as it is written in files and commands.
type Kind string

// The kinds of resources that people write.
const (
	KindNamespace Kind = "namespace"
	KindNode      Kind = "node"
	KindService   Kind = "service"
	KindIntention Kind = "intention"
	KindPolicy    Kind = "policy"
	KindRole      Kind = "role"
)

// Kinds returns every kind, in the order in which resources may be applied so
// that what is referred to exists first.
func Kinds() []Kind {
	return []Kind{KindNamespace, KindNode, KindService, KindIntention, KindPolicy, KindRole}
}

// A Resource is one decoded and valid resource of a file.
type Resource struct {
	Kind Kind
	// Value is a catalog.Namespace, catalog.Node, catalog.Service,
	// intentions.Intention, catalog.Policy or catalog.Role, by Kind. Defaults are not
	// written into it.
	Value any
	// File and Line are where the resource starts.
	File string
	Line int
}

// Name returns what tells the resource from others of its kind: "vm-017",
// "default/api", "web → api".
func (r Resource) Name() string {
	switch v := r.Value.(type) {
	case catalog.Namespace:
		return v.Name
	case catalog.Node:
		return v.Name
	case catalog.Service:
		return v.Ref().String()
	case intentions.Intention:
		if key, err := v.Key(); err == nil {
			return key.String()
		}
		return v.Source + " → " + v.Destination
	case catalog.Policy:
		return v.Name
	case catalog.Role:
		return v.Name
	default:
		return ""
	}
}

// Decode turns the document into a resource. Unknown fields are refused, and
// Validate of the kind is run; the error holds all its problems, see Errors.
func (d *Document) Decode() (Resource, error) {
	p := &problems{file: d.File}
	r := Resource{Kind: d.Kind, File: d.File, Line: d.Line}
	switch d.Kind {
	case KindNamespace:
		r.Value = decodeAs[catalog.Namespace](p, d)
	case KindNode:
		r.Value = decodeAs[catalog.Node](p, d)
	case KindService:
		r.Value = decodeAs[catalog.Service](p, d)
	case KindIntention:
		r.Value = decodeAs[intentions.Intention](p, d)
	case KindPolicy:
		r.Value = decodeAs[catalog.Policy](p, d)
	case KindRole:
		r.Value = decodeAs[catalog.Role](p, d)
	default:
		p.add(d.Line, "kind", "%q is no kind of resource", d.Kind)
	}
	if err := p.err(); err != nil {
		return Resource{}, err
	}
	return r, nil
}

// Load reads, decodes and validates a file of resources, in the file's order. A
// resource that the file holds twice is an error. The error holds all problems
// that were found, see Errors; with an error there are no resources.
func Load(filename string, data []byte) ([]Resource, error) {
	docs, err := Parse(filename, data)
	if err != nil {
		return nil, err
	}
	p := &problems{file: filename}
	var all []Resource
	type identity struct {
		kind Kind
		name string
	}
	first := map[identity]int{}
	for i := range docs {
		r, err := docs[i].Decode()
		if err != nil {
			p.errs = append(p.errs, Errors(err)...)
			continue
		}
		id := identity{r.Kind, r.Name()}
		if line, ok := first[id]; ok {
			p.add(r.Line, "", "%s %s is given twice, first in line %d: remove one", r.Kind, id.name, line)
			continue
		}
		first[id] = r.Line
		all = append(all, r)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return all, nil
}

// Definitions reads, decodes and validates a file of services.d, in the file's
// order. In YAML and JSON the kind, which can only be service, may be left out.
// Two definitions of one service with one ID are an error. The error holds all
// problems that were found, see Errors; with an error there are no definitions.
func Definitions(filename string, data []byte) ([]catalog.Definition, error) {
	docs, err := parse(filename, data, definitionBlocks(), KindService)
	if err != nil {
		return nil, err
	}
	p := &problems{file: filename}
	var all []catalog.Definition
	for i := range docs {
		d := decodeAs[catalog.Definition](p, &docs[i])
		if port := docs[i].root.get("port"); d.Port == 0 && port != nil && port.text == "0" {
			// Zero decodes like absence, which means a pure client.
			p.add(port.line, "port", "write a port, 1 to 65535, or remove the field for a pure client")
		}
		if n := slices.IndexFunc(all, func(o catalog.Definition) bool {
			return o.Ref() == d.Ref() && o.InstanceID() == d.InstanceID()
		}); n >= 0 {
			p.add(docs[i].Line, "id", "service %s with id %q is defined in line %d too: give one of them another id",
				d.Ref().Short(), d.InstanceID(), docs[n].Line)
		}
		all = append(all, d)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return all, nil
}

// DecodeConfig reads a file of configuration into the struct that into points
// to: strictly, after what the struct holds as defaults. Fields are matched by
// their json tags; an HCL block without label is a nested struct. If the struct
// has a Validate method, its field errors get their lines. On an error the
// struct may be filled in part.
func DecodeConfig(filename string, data []byte, into any) error {
	p := &problems{file: filename}
	var root *node
	switch f := formatOf(p, data); f {
	case formatHCL:
		root = readHCLObject(p, data)
	case formatJSON:
		if decodeAtOnce(data, into) {
			return nil
		}
		fallthrough
	case formatYAML:
		switch nodes := roots(p, f, data); len(nodes) {
		case 0:
			root = &node{kind: nodeObject, line: 1}
		case 1:
			root = nodes[0]
		default:
			p.add(nodes[1].line, "", "holds several documents: write one")
		}
	case formatNone:
	}
	if err := p.err(); err != nil {
		return err
	}
	if root == nil {
		return &Error{File: filename, Problem: "cannot be read"}
	}
	if root.kind != nodeObject {
		return &Error{File: filename, Line: root.line, Problem: "is " + root.kind.String() + ": write fields and their values"}
	}
	d := newDocument(p, "", root)
	if len(p.errs) == 0 {
		d.decode(p, into)
	}
	return p.err()
}

// decodeAtOnce decodes and validates JSON, and reports whether nothing is wrong with
// it. Else into is as before, and it remains to find out what is wrong, and where.
func decodeAtOnce(data []byte, into any) bool {
	if len(data) == 0 || bytes.IndexByte(data, '{') < 0 {
		return false // an empty file is an empty object, and null is none
	}
	fresh := reflect.New(reflect.TypeOf(into).Elem())
	fresh.Elem().Set(reflect.ValueOf(into).Elem())
	if strict(data, fresh.Interface()) != nil {
		return false
	}
	if v, ok := reflect.TypeAssert[validator](fresh); ok && v.Validate() != nil {
		return false
	}
	reflect.ValueOf(into).Elem().Set(fresh.Elem())
	return true
}

// decodeAs decodes and validates the document as a T, recording all problems.
func decodeAs[T any](p *problems, d *Document) T {
	var v T
	d.decode(p, &v)
	return v
}

// A validator is a value that checks itself, see catalog.FieldErrors.
type validator interface{ Validate() error }

// decode decodes and validates the document into a pointer, recording all
// problems.
func (d *Document) decode(p *problems, into any) {
	if err := strict(d.JSON, into); err != nil {
		d.explain(p, into, err)
		return
	}
	v, ok := into.(validator)
	if !ok {
		return
	}
	// Only what an own Validate found has a place; anything else is kept too.
	if err := v.Validate(); err != nil {
		if _, ok := errors.AsType[*catalog.FieldError](err); !ok {
			p.add(d.Line, "", "%v", err)
			return
		}
		p.addFields(err, d.LineOf)
	}
}
