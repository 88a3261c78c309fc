"""Lists of config overrides plus one call; what came out is in results/*.jsonl."""
