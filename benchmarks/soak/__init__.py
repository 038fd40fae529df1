"""Tried to death: random load against contexts, malformed adapters and bodies, killed processes."""
