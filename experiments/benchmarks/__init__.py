"""What measures speed: ours by itself, and against the peers."""
