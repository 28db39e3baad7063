"""The control socket: how other programs look into a VM that a ``bhyve`` runs."""
