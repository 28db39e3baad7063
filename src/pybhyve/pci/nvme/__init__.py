"""NVMe disks (NVM Express 1.4).  bhyve: pci_nvme.c.

`spec` has the specification's numbers, `queues` the rings and the commands in them,
`prp` where data are, `admin` and `namespace` the two command sets, `device` the rest.
"""

from __future__ import annotations

from pybhyve.pci.nvme.device import NvmeOptions, PciNvme

__all__ = ["NvmeOptions", "PciNvme"]
