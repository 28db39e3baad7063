"""The ``bhyve`` program: command line, bring-up, vCPU threads, exits."""
