"""A trained network written for other programs, and read again."""
