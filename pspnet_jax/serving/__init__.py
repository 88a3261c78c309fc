"""Exporting a trained network for other programs, and reading exports."""
