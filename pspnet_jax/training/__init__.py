"""Training, from a config to checkpoints: the loop, the pure update, losses, optimisers."""
