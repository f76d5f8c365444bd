"""Meshes, expert exchange, pipeline schedules and optimiser sharding (report, section 3.2)."""
