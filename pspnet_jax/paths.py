"""Paths as a person types them."""

import re
from pathlib import Path

from pspnet_jax.errors import ConfigError


def local(path: str | Path) -> Path:
    """`path` with ~ expanded. Raises ConfigError for the address of a bucket or server.

    Only folders of this machine are read and written: gs://... would become a folder called gs:.
    """
    text = str(path)
    if scheme := re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', text):
        raise ConfigError(
            f'{text} is an address ({scheme[0]}/...), not a folder of this machine: mount or copy '
            'it, and give the local path'
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home
        raise ConfigError(f'{text}: {error}: give the path without ~') from error
