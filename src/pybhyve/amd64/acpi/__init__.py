"""ACPI tables: one file a table, and a small AML encoder.  bhyve: acpi.c, basl.c."""

from __future__ import annotations

from pybhyve.amd64.acpi.aml import Aml

__all__ = ["Aml"]
