package catalog

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Protocol is what a service speaks on a port.
type Protocol string

// The protocols. The zero value means ProtocolAuto.
const (
	ProtocolAuto  Protocol = "auto"
	ProtocolHTTP  Protocol = "http"
	ProtocolHTTP2 Protocol = "http2"
	ProtocolGRPC  Protocol = "grpc"
	ProtocolTCP   Protocol = "tcp"
)

// Protocols returns all protocols, in the order of the documentation.
func Protocols() []Protocol {
	return []Protocol{ProtocolAuto, ProtocolHTTP, ProtocolHTTP2, ProtocolGRPC, ProtocolTCP}
}

// HTTP reports whether the protocol is declared to be HTTP of some version.
func (p Protocol) HTTP() bool { return p == ProtocolHTTP || p == ProtocolHTTP2 || p == ProtocolGRPC }

// OrAuto returns p, or ProtocolAuto for the zero value.
func (p Protocol) OrAuto() Protocol {
	if p == "" {
		return ProtocolAuto
	}
	return p
}

// protocol records a problem of the optional protocol v at path.
func (p *Problems) protocol(path string, v Protocol) {
	all := Protocols()
	if v == "" || slices.Contains(all, v) {
		return
	}
	names := make([]string, len(all))
	for i, one := range all {
		names[i] = string(one)
	}
	p.Add(path, "%q is no protocol%s: write one of %s", v, didYouMean(string(v), names), strings.Join(names, ", "))
}

// upgrade records a problem of an upgrade at path.
func (p *Problems) upgrade(path string, upgrade bool, of Protocol) {
	if upgrade && of != ProtocolHTTP {
		p.Add(path, "is for ports whose protocol is http, and this one's is %s: remove it, or declare the protocol", of.OrAuto())
	}
}

// DefaultPort is the name of a service's port when its definition gives only a
// number.
const DefaultPort = "default"

// A Service is the mesh-wide spec of a service, on which all its instances
// agree.
type Service struct {
	// Namespace is DefaultNamespace when empty.
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	// Ports are the ports of every instance; none means a pure client, which
	// has an identity and upstreams but receives nothing.
	Ports []ServicePort `json:"ports,omitempty"`
	// Owner is the team or person to ask, for display.
	Owner string `json:"owner,omitempty"`
}

// A ServicePort is one named port of a service. The number is each instance's
// own.
type ServicePort struct {
	Name     string   `json:"name"`
	Protocol Protocol `json:"protocol,omitempty"`
	// Default marks the port of callers that name none.
	Default bool `json:"default,omitzero"`
	// Upgrade has the requests of a ProtocolHTTP port carried over HTTP/2 between
	// the proxies; the applications still see HTTP/1.
	Upgrade bool `json:"upgrade,omitzero"`
}

// ErrMismatch is wrapped by the error of Service.Agrees.
var ErrMismatch = errors.New("definition differs from the service")

// Ref returns the service's name with its namespace resolved.
func (s Service) Ref() Name { return Name{Namespace: orDefault(s.Namespace), Name: s.Name} }

// WithDefaults returns a copy in which every default is written out: namespace,
// protocols, and Default on a single port. It shares nothing with s that a
// caller could change.
func (s Service) WithDefaults() Service {
	s.Namespace = orDefault(s.Namespace)
	s.Ports = slices.Clone(s.Ports)
	for i := range s.Ports {
		s.Ports[i].Protocol = s.Ports[i].Protocol.OrAuto()
	}
	if len(s.Ports) == 1 {
		s.Ports[0].Default = true
	}
	return s
}

// Port returns the port called name with defaults written out; an empty name
// means the default port. The second result is false when there is no such
// port.
func (s Service) Port(name string) (ServicePort, bool) {
	for _, p := range s.WithDefaults().Ports {
		if p.Name == name || name == "" && p.Default {
			return p, true
		}
	}
	return ServicePort{}, false
}

// Agrees reports the first field in which other, what an agent's definition
// says of the service, differs from s, the central spec; nil means none. Both
// are compared with defaults written out, ports in any order. Owner is not
// compared: definitions do not carry one. Nor is an Upgrade that only s has: an
// agent that is older than the field can't say it. The error wraps ErrMismatch
// and says both values.
func (s Service) Agrees(other Service) error {
	a, b := s.WithDefaults(), other.WithDefaults()
	if a.Ref() != b.Ref() {
		return mismatch("name", a.Ref().String(), b.Ref().String())
	}
	if an, bn := portNames(a), portNames(b); !slices.Equal(an, bn) {
		return mismatch("ports", list(an), list(bn))
	}
	for _, ap := range a.Ports {
		bp, _ := b.Port(ap.Name)
		field := "ports[" + ap.Name + "]"
		switch {
		case ap.Protocol != bp.Protocol:
			return mismatch(field+".protocol", string(ap.Protocol), string(bp.Protocol))
		case ap.Default != bp.Default:
			return mismatch(field+".default", fmt.Sprint(ap.Default), fmt.Sprint(bp.Default))
		case bp.Upgrade && !ap.Upgrade:
			return mismatch(field+".upgrade", "false", "true")
		}
	}
	return nil
}

func mismatch(field, central, local string) error {
	return fmt.Errorf("%w: %s is %s in the service and %s in the definition: "+
		"change the definition, or change the service first with meshctl apply", ErrMismatch, field, central, local)
}

func portNames(s Service) []string {
	names := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		names[i] = p.Name
	}
	slices.Sort(names)
	return names
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ",")
}

// maxPorts bounds the ports of one service: each costs a TLS server name and an
// endpoint in every caller's plan.
const maxPorts = 64

// Validate reports every problem of the spec; see FieldErrors.
func (s Service) Validate() error {
	var p Problems
	p.namespace("namespace", s.Namespace)
	p.label("name", s.Name)
	p.ports("ports", s.Ports)
	if len(s.Owner) > maxMetaValue || !printable(s.Owner) {
		p.Add("owner", "write at most %d printable characters", maxMetaValue)
	}
	return p.Err()
}

// ports records the problems of a service's ports at path.
func (p *Problems) ports(path string, ports []ServicePort) {
	if len(ports) > maxPorts {
		p.Add(path, "%d ports, at most %d are allowed", len(ports), maxPorts)
	}
	defaults := 0
	for i, port := range ports {
		at := fmt.Sprintf("%s[%d]", path, i)
		p.label(at+".name", port.Name)
		if first := slices.IndexFunc(ports[:i], func(o ServicePort) bool { return o.Name == port.Name }); first >= 0 {
			p.Add(at+".name", "%q is taken by %s[%d]: give each port its own name", port.Name, path, first)
		}
		p.protocol(at+".protocol", port.Protocol)
		p.upgrade(at+".upgrade", port.Upgrade, port.Protocol)
		if !port.Default {
			continue
		}
		if defaults++; defaults == 2 {
			p.Add(at+".default", "a second default: keep default = true on one port")
		}
	}
	if len(ports) > 1 && defaults == 0 {
		p.Add(path, "several ports and no default: set default = true on the one that callers get when they name none")
	}
}
