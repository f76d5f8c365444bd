"""Latent cache, sampling, speculative decoding and the serving engines (report, section 3.4)."""
