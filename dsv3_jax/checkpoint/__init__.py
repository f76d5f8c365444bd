"""Saving and restoring runs, and conversion from and to Hugging Face checkpoints."""
