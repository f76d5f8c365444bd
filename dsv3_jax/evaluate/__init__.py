"""What a model can do: benchmarks, the report's protocol, long contexts (report 4.4, 4.3, 5.3)."""
