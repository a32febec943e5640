"""Arrays that are built once and kept on disk.

A file is the SHA-256 of what follows and an uncompressed .npz. Its name carries a hash of all that determines the
content, so another input, or another version of this program, is another file; a damaged one is built again.
"""

import hashlib
import io
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

FORMAT = 1
"""Raise it when the same input gives other arrays."""

_log = logging.getLogger(__name__)


def directory() -> pathlib.Path:
    """The user's: $XDG_CACHE_HOME/jpeglm, else ~/.cache/jpeglm."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jpeglm"


def cached(
    folder: pathlib.Path, name: str, key: object, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `build` makes, from the disk if they are there.

    A folder that cannot be written to costs a warning and the time to build, no more.

    Args:
      folder: made if it is missing.
      name: what the file name begins with, for people.
      key: all that `build` depends on; its repr counts.
      build: makes the arrays.
    """
    digest = hashlib.sha256(repr((FORMAT, key)).encode()).hexdigest()
    path = folder / f"{name}-v{FORMAT}-{digest[:16]}.npz"
    try:
        content = memoryview(path.read_bytes())
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            with np.load(io.BytesIO(content[32:]), allow_pickle=False) as arrays:
                return dict(arrays)
        _log.warning("%s is damaged: building it again", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("cannot read %s (%s): building it", path, error.strerror or error)

    began = time.monotonic()
    arrays = build()
    _log.info("built %s in %.1f s", path.name, time.monotonic() - began)
    payload = io.BytesIO()
    np.savez(payload, **arrays)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: no reader sees half a file, and of several writers one wins.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.stem}.", delete=False) as file:
            file.write(hashlib.sha256(payload.getbuffer()).digest())
            file.write(payload.getbuffer())
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("cannot keep %s (%s): it will be built again", path, error.strerror or error)
    return arrays
