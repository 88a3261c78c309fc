"""Paths that the user types, and the user's cache folder."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pspnet_jax.runtime.errors import ConfigError

ZOO = Path(__file__).parent.parent / 'zoo'  # networks that come with the package
KNOWN_DATA = 'data_read.txt'  # in the cache folder
MOST_KNOWN = 1000


def local(path: str | Path) -> Path:
    """Expand ~ in `path`; zoo:NAME is a network that comes with the package.

    Raises ConfigError for an unknown NAME, and for the address of a bucket or server. Only local
    folders are read and written: gs://... would create a folder called gs:.
    """
    text = str(path)
    if text.startswith('zoo:'):
        name = text.removeprefix('zoo:')
        if name not in zoo():
            raise ConfigError(f'{text} is not one of {", ".join(f"zoo:{name}" for name in zoo())}')
        return ZOO / name
    if scheme := re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', text):
        raise ConfigError(
            f'{text} is an address ({scheme[0]}/...), not a local folder: mount or copy it, and '
            'give the local path'
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home folder
        raise ConfigError(f'{text}: {error}: give the path without ~') from error


def zoo() -> list[str]:
    """The names of the networks that come with the package."""
    return sorted(path.name for path in ZOO.glob('*') if path.is_dir())


def writable(path: str | Path, what: str) -> Path:
    """`local`. Raises ConfigError for a network of the package, where `what` would be written."""
    if str(path).startswith('zoo:'):
        raise ConfigError(f'{path} comes with the package and is not written to: give {what}')
    return local(path)


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
