"""Where pictures come from, each kind as random access by number.

Sources hold paths and counts, never open files, so that they can be sent to worker processes.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import grain
import numpy as np
from etils import epath

from jpeglm_jax.data import flags
from jpeglm_jax.data.pictures import EXTENSIONS, BadPicture


class Source(Protocol):
    """Pictures by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        """A picture file's bytes or uint8 (height, width, 3): what `pictures.load` takes.

        Raises:
          BadPicture: the file cannot be read, and never will. Whatever else it raises may pass: it is asked again.
        """

    def name(self, index: int) -> str:
        """What to call a picture in a log."""

    def fingerprint(self) -> str:
        """A hash that is another when the pictures or their order are."""


def open_source(path: str, split: str) -> Source:
    """The pictures at a path.

    Args:
      path: a folder, searched with all its subfolders; files `*.array_record*`, also with wildcards; `tfds:NAME`; or
        `builtin:flags`. Folders and files may be gs://.
      split: of a TFDS data set; others have none.

    Raises:
      ValueError: there is nothing to read at the path.
    """
    kind, _, name = path.partition(":")
    if kind == "builtin":
        if name != "flags":
            raise ValueError(f"no built-in pictures named {name!r}; there is: builtin:flags")
        return Flags()
    if kind == "tfds":
        return Tfds(name, split)
    if ".array_record" in os.path.basename(path):
        return ArrayRecords(path)
    return Folder(path)


class Folder:
    """Picture files below a folder, in the order of their names; hidden ones and linked folders are left out."""

    def __init__(self, path: str):
        self._root = epath.Path(path).expanduser()
        if not self._root.is_dir():
            raise ValueError(f"no folder {path}: give a folder of pictures, *.array_record, tfds:NAME or builtin:flags")
        # One string and one array, made part by part: a Python object for each of a million names would cost more than
        # the pictures of a batch, in every worker process.
        walk, parts = map(os.fsencode, _picture_names(self._root)), []
        while part := list(itertools.islice(walk, 10_000)):
            parts.append(np.array(part))
        if not parts:
            raise ValueError(f"no pictures in {path}; files that are read end in {', '.join(_ENDINGS)}")
        names = np.sort(np.concatenate(parts))
        self._ends = np.cumsum(np.char.str_len(names))
        characters = names.view(np.uint8)
        self._names = characters[characters != 0].tobytes()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        try:
            return (self._root / self.name(index)).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise BadPicture(f"cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[self._ends[index - 1] if index else 0 : self._ends[index]])

    def fingerprint(self) -> str:
        # Names only: a file that breaks during a run is skipped, and makes no other set, as it moves no other picture.
        return _hash(map(self.name, range(len(self))))


class ArrayRecords:
    """Records of ArrayRecord files, each a picture file."""

    def __init__(self, pattern: str):
        self._pattern = pattern
        root, name = os.path.split(pattern)
        files = sorted(epath.Path(root or ".").expanduser().glob(name))
        if not files:
            raise ValueError(f"no file matches {pattern}")
        self._sizes = [f"{file.name} {file.stat().length}" for file in files]
        try:
            self._records = grain.sources.ArrayRecordDataSource([os.fspath(file) for file in files])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{pattern}: not ArrayRecord files ({_first_line(error)})") from error
        if not len(self._records):
            raise ValueError(f"{pattern}: no records in {len(files)} files")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return _read_record(self._records, index)

    def name(self, index: int) -> str:
        return f"record {index} of {self._pattern}"

    def fingerprint(self) -> str:
        return _hash([*self._sizes, f"{len(self)} records"])


class Tfds:
    """The feature `image` of a TFDS data set that is prepared in the ArrayRecord format; TensorFlow is not needed."""

    def __init__(self, name: str, split: str):
        import tensorflow_datasets as tfds  # takes a second, which other sources save

        self._name, self._split = name, split
        place = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        try:
            builder = tfds.builder(name, data_dir=place)
        except (ValueError, AssertionError, ImportError) as error:
            raise ValueError(f"no TFDS data set {name!r} in {place} ({_first_line(error)})") from error
        if "image" not in builder.info.features:
            raise ValueError(f"tfds:{name} has no feature `image`, only {', '.join(sorted(builder.info.features))}")
        try:
            self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f"tfds:{name} is not prepared in {place} as ArrayRecord: "
                f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
            ) from error
        except ValueError as error:
            raise ValueError(f"tfds:{name} has no split {split!r} with pictures ({_first_line(error)})") from error
        self._full_name = builder.info.full_name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        return _read_record(self._records, index)["image"]

    def name(self, index: int) -> str:
        return f"picture {index} of tfds:{self._name}, split {self._split}"

    def fingerprint(self) -> str:
        return _hash([self._full_name, self._split, f"{len(self)} pictures"])


class Flags:
    """50,000 invented flags of 48x48 pixels; 26,265 are different, so that others may equal one that is held out."""

    def __len__(self) -> int:
        return 50_000

    def __getitem__(self, index: int) -> np.ndarray:
        return flags.flag(int(index), flags.NATIVE_SIZE)

    def name(self, index: int) -> str:
        return f"builtin:flags {index}"

    def fingerprint(self) -> str:
        return _hash([f"{len(self)} flags", *(self[index].tobytes().hex() for index in range(16))])


_ENDINGS = tuple(ending for endings in EXTENSIONS.values() for ending in endings)


def _picture_names(root: epath.Path) -> Iterator[str]:
    for folder, _, files in root.walk():
        parts = folder.relative_to(root).parts
        if not any(part.startswith(".") for part in parts):
            pictures = (file for file in files if file.lower().endswith(_ENDINGS) and not file.startswith("."))
            yield from ("/".join((*parts, file)) for file in pictures)


def _read_record(records: Any, index: int) -> Any:
    try:
        return records[index]
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "corrupted" not in str(error).lower():
            raise  # not a matter of what is in the file: the reader has one type for everything
        raise BadPicture(f"cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()
