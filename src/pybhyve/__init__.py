"""bhyve, FreeBSD's virtual machine monitor, for Linux."""
