"""Devices beside the console, used by a kernel's own drivers."""

from __future__ import annotations

import re
import socket
import threading

from tests.functional.machine import BOOT_TIMEOUT, Starter
from tools import guests


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_pci_uart_carries_both_ways(start: Starter) -> None:
    """BAR, INTx through the IOAPIC, FIFO and back-pressure, with Linux's driver."""
    guest = guests.find("debian12-cloud")
    port = free_port()
    image = [
        *guest.image().options(),
        *("-s", f"3,uart,tcp=127.0.0.1:{port}"),
        *("-o", f"cmdline={guest.cmdline} quiet 8250.nr_uarts=5"),
    ]
    console = start("uart", image, guest=guest).console
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)
    tty = console.run("dmesg | grep 0000:00:03.0: | grep ttyS4")
    console.run("stty -F /dev/ttyS4 raw -echo")

    assert "is a 16550A" in tty

    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(30)
        text = bytes(range(256)) * 16
        sender = threading.Thread(target=line.sendall, args=(text,))
        receive = f"head -c {len(text)} /dev/ttyS4 > /tmp/in; echo > /tmp/done"
        console.run(f"({receive}) & true")
        # As on any serial line, what comes before the port is open is lost.
        console.run("sleep 1")
        sender.start()
        console.run("while [ ! -e /tmp/done ]; do sleep 0.1; done", 120)
        sender.join()
        console.run("cat /tmp/in > /dev/ttyS4")
        back = b""
        while len(back) < len(text):
            back += line.recv(65536)

        assert back == text

    console.send("poweroff\n")

    assert console.wait(60) == 1


def test_mp_table_is_enough_for_two_cpus(start: Starter) -> None:
    """Without ACPI: processors, ISA and PCI interrupts from the MP table."""
    guest = guests.find("debian12-i386")
    image = [
        *guest.image().options(),
        *("-s", "3,uart"),
        *("-o", f"cmdline={guest.cmdline} acpi=off 8250.nr_uarts=5"),
    ]
    console = start("mptable", image, guest=guest, ncpus=2).console
    console.expect("MPTABLE: OEM ID: BHyVe", BOOT_TIMEOUT)
    console.expect("Brought up 1 node, 2 CPUs", BOOT_TIMEOUT)
    console.expect(r"PCI->APIC IRQ transform: INT A -> IRQ 16", BOOT_TIMEOUT)
    console.expect(re.escape(guest.prompt), BOOT_TIMEOUT)

    assert console.run("echo $((6 * 7))") == "42\n"
