"""What attacks: files changed at random, kills, faults, a long run."""
