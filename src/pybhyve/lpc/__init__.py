"""The tenants of the LPC bridge."""
