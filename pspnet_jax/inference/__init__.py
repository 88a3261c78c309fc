"""Opens a trained network, and turns images into probabilities and labels."""
