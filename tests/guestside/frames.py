"""A station's half of Ethernet: frames with ARP, IPv4, ICMP, UDP and TCP in them."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

BROADCAST = b"\xff" * 6
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ICMP, TCP, UDP = 1, 6, 17
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def checksum(data: bytes) -> int:
    """RFC 1071, the slow way."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def address(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def ether(dst: bytes, src: bytes, ethertype: int, payload: bytes) -> bytes:
    return dst + src + ethertype.to_bytes(2, "big") + payload


def arp(operation: int, mac: bytes, ip: str, their_mac: bytes, their_ip: str) -> bytes:
    return (
        struct.pack(">HHBBH", 1, ETHERTYPE_IPV4, 6, 4, operation)
        + mac
        + address(ip)
        + their_mac
        + address(their_ip)
    )


def ipv4(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    fields = [0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0]
    header = struct.pack(">BBHHHBBH", *fields) + address(src) + address(dst)
    fields[7] = checksum(header)
    header = struct.pack(">BBHHHBBH", *fields) + address(src) + address(dst)
    return header + payload


def pseudo(src: str, dst: str, protocol: int, length: int) -> bytes:
    return address(src) + address(dst) + struct.pack(">HH", protocol, length)


def udp(src: str, sport: int, dst: str, dport: int, payload: bytes) -> bytes:
    length = 8 + len(payload)
    header = struct.pack(">HHHH", sport, dport, length, 0)
    total = checksum(pseudo(src, dst, UDP, length) + header + payload)
    header = struct.pack(">HHHH", sport, dport, length, total)
    return ipv4(src, dst, UDP, header + payload)


def tcp_segment(
    sport: int, dport: int, seq: int, ack: int, flags: int, payload: bytes = b""
) -> bytes:
    """A segment whose checksum is zero."""
    fields = (sport, dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, flags, 65535)
    return struct.pack(">HHIIBBHHH", *fields, 0, 0) + payload


class Tcp(NamedTuple):
    """What a frame with TCP in it says."""

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    payload: bytes


def parse_tcp(frame: bytes) -> Tcp | None:
    """TCP in a frame, its checksum verified; None for other frames."""
    packet = frame[14:]
    if frame[12:14] != b"\x08\x00" or packet[9] != TCP:
        return None
    assert checksum(packet[:20]) == 0
    segment = packet[20 : int.from_bytes(packet[2:4], "big")]
    whole = packet[12:20] + struct.pack(">HH", TCP, len(segment)) + segment
    assert checksum(whole) == 0
    sport, dport, seq, ack, offset, flags = struct.unpack_from(">HHIIBB", segment)
    return Tcp(sport, dport, seq, ack, flags, segment[(offset >> 4) * 4 :])
