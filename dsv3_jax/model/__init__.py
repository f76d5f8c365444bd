"""DeepSeek-V3's architecture: MLA, DeepSeekMoE, multi-token prediction (report, section 2)."""
