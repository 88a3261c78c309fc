"""Benchmarks of our speed, alone and compared with peers."""
