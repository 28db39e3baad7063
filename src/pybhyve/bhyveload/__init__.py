"""bhyveload: puts a guest operating system into a VM that ``bhyve`` then runs."""
