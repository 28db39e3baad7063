"""AHCI: the adapter (hba), its ports, and what is at them (ata, atapi)."""

from __future__ import annotations

from pybhyve.pci.ahci.hba import AhciOptions, AhciPortOptions, PciAhci

__all__ = ["AhciOptions", "AhciPortOptions", "PciAhci"]
