#!/bin/sh
# What busybox's udhcpc calls when it has an address.
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route add default via "$router"
[ -z "$dns" ] || echo "nameserver $dns" > /etc/resolv.conf
