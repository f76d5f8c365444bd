"""Meshes, the exchange of tokens and experts, and sharded state (report 3.2)."""
