"""Scores of a trained network by patient, and the report that shows them."""
