"""What makes the machine a PC: ports, memory ranges, platform devices, tables."""
