"""A trained network opened, and what it says of an image: probabilities, then labels."""
