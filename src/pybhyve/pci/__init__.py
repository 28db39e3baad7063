"""PCI: buses, and one file per device."""
