package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// errAdvertise is wrapped when no address fits the setting.
var errAdvertise = errors.New("advertise: no such address on this host")

// advertised returns the address under which other hosts reach this one.
func advertised(ctx context.Context, setting string, servers []string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(setting); err == nil {
		return ip, nil
	}
	if prefix, err := netip.ParsePrefix(setting); err == nil {
		return pick(setting, nil, func(ip netip.Addr) bool { return prefix.Contains(ip) })
	}
	if setting != "" {
		i, err := net.InterfaceByName(setting)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("%w: %q is neither an IP address, a CIDR nor an interface", errAdvertise, setting)
		}
		return pick(setting, i, func(ip netip.Addr) bool { return !ip.IsLinkLocalUnicast() })
	}
	// Connecting UDP sends nothing: it asks the kernel for the way there.
	var d net.Dialer
	for _, server := range servers {
		conn, err := d.DialContext(ctx, "udp", server)
		if err != nil {
			continue
		}
		local, err := netip.ParseAddrPort(conn.LocalAddr().String())
		_ = conn.Close()
		if err == nil {
			return local.Addr().Unmap(), nil
		}
	}
	return pick("default", nil, func(ip netip.Addr) bool { return ip.IsGlobalUnicast() })
}

// pick returns the first address, IPv4 before IPv6, of an interface, or of
// all, that fits.
func pick(setting string, i *net.Interface, fits func(netip.Addr) bool) (netip.Addr, error) {
	list := net.InterfaceAddrs
	if i != nil {
		list = i.Addrs
	}
	addrs, err := list()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%w: %q: %w", errAdvertise, setting, err)
	}
	var six netip.Addr
	for _, a := range addrs {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		switch ip := prefix.Addr().Unmap(); {
		case !fits(ip):
		case ip.Is4():
			return ip, nil
		case !six.IsValid():
			six = ip
		}
	}
	if !six.IsValid() {
		return netip.Addr{}, fmt.Errorf("%w: %q fits none", errAdvertise, setting)
	}
	return six, nil
}
