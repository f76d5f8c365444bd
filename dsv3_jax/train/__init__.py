"""Optimiser, phases, step, loop and reports of a training run (report, sections 3 and 4)."""
