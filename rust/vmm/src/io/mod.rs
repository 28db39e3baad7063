//! In-kernel devices: what bhyve keeps in sys/amd64/vmm/io.
