"""Opening a trained network, and going from images to probabilities and labels."""
