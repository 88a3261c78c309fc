"""Paths that the user types, and the user's cache folder."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pspnet_jax.runtime.errors import ConfigError

KNOWN_DATA = 'data_read.txt'  # in the cache folder
MOST_KNOWN = 1000


def local(path: str | Path) -> Path:
    """Expand ~ in `path`. Raises ConfigError for the address of a bucket or server.

    Only local folders are read and written: gs://... would create a folder called gs:.
    """
    text = str(path)
    if scheme := re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', text):
        raise ConfigError(
            f'{text} is an address ({scheme[0]}/...), not a local folder: mount or copy it, and '
            'give the local path'
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home folder
        raise ConfigError(f'{text}: {error}: give the path without ~') from error


def cache() -> Path | None:
    """This user's cache folder; None without a home folder."""
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'pspnet_jax'
    except RuntimeError:  # as in some containers
        return None


def remember(places: Sequence[str]) -> None:
    """Record that this user trained on the data at these places (see `are_known`)."""
    place, known = cache(), _known()
    added = [path for path in places if path not in known]
    if place is None or not added:
        return
    with contextlib.suppress(OSError):  # evaluation will ask for --data
        place.mkdir(parents=True, exist_ok=True)
        aside = place / f'{KNOWN_DATA}.{os.getpid()}'
        lines = [line for line in (*known, *added) if '\n' not in line][-MOST_KNOWN:]
        aside.write_text(''.join(f'{line}\n' for line in lines), 'utf-8', 'surrogateescape')
        aside.replace(place / KNOWN_DATA)


def are_known(places: Sequence[str]) -> bool:
    """Whether this user has trained on the data at all of these places.

    An untrusted checkpoint may name any folder, including ones that the user never meant to read.
    """
    return set(places) <= set(_known())


def _known() -> list[str]:
    place = cache()
    with contextlib.suppress(OSError):
        if place:
            return (place / KNOWN_DATA).read_text('utf-8', 'surrogateescape').splitlines()
    return []
