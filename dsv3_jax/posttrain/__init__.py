"""Supervised fine-tuning, reinforcement learning and synthesis (report, section 5)."""
