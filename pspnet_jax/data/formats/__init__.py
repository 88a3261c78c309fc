"""Reads and writes images, volumes, videos and annotations of all formats."""

from pspnet_jax.data.formats.picture import (
    Picture,
    output_suffix,
    read,
    read_labels,
    read_palette,
    stack,
    write_labels,
    write_probabilities,
)

__all__ = ['Picture', 'output_suffix', 'read', 'read_labels', 'read_palette', 'stack',
           'write_labels', 'write_probabilities']  # fmt: skip
