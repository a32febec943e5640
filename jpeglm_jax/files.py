"""Files that are written whole or not at all, whatever becomes of the process that writes them."""

from etils import epath


def write(path: epath.PathLike, data: bytes) -> None:
    """Puts `data` in the place of what is at `path`; the directory is made if it is missing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
