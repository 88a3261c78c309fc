"""Masks and pictures for files: finding inputs, predicting, writing results."""
