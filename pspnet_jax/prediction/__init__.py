"""Prediction for files: finding inputs, predicting, writing masks and pictures."""
