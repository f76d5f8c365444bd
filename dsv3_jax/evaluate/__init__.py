"""The evaluation harness and its protocols (report, sections 4.4 and 5.3)."""
