"""Number formats, blocks and scales, GEMMs with their derivatives (report, section 3.3)."""
