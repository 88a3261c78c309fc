"""Masks and pictures for files: which are predicted, how, and what is written."""
