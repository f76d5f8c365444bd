"""Post-training: fine-tuning, synthesis, rewards, reinforcement learning (report 5)."""
