"""Metrics of a trained network per patient, and the report that shows them."""
