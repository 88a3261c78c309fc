"""Exports a trained network for other programs, and reads exports."""
