"""bhyvectl: looks into VMs, and creates, changes and destroys them."""
