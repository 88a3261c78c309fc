"""From a config to checkpoints: the loop, the pure update, losses, optimisers."""
