"""Where what is derived from a data set is kept: beside it, or else in the user's cache folder."""

import hashlib
import os
import tempfile
from pathlib import Path


def cache_paths(path: str, ending: str) -> tuple[Path, Path]:
    """The two places of a cache of the file `path`; the second is for where the first is read-only.

    Both can be deleted at any time.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = hashlib.blake2b(os.path.realpath(path).encode(), digest_size=8).hexdigest()
    return Path(path + ending), home / "storm_jax" / place / (os.path.basename(path) + ending)


def write_cache(path: str, ending: str, content: bytes) -> None:
    """Writes a cache file in the first of its places that can be written, whole or not at all.

    Raises:
      OSError: neither can be written.
    """
    beside, home = cache_paths(path, ending)
    try:
        _replace(beside, content)
    except OSError:
        home.parent.mkdir(parents=True, exist_ok=True)
        _replace(home, content)


def _replace(target: Path, content: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            temporary = file.name
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)
        raise
