"""Experiments: config overrides and one call each; their results are in results/*.jsonl."""
