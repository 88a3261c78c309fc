"""Data: sources, volumes and slices, splits, augmentation, batches."""
