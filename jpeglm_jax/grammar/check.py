"""`jpeglm check`: files against a codec, a line each."""

from collections.abc import Iterable
from pathlib import Path

from jpeglm_jax import codecs
from jpeglm_jax.config import JpegConfig
from jpeglm_jax.grammar.diagnose import diagnose
from jpeglm_jax.grammar.layout import read_layout


def check(files: Iterable[str], config: JpegConfig) -> bool:
    """Prints the verdict on each file; returns whether all are valid.

    Args:
      files: .jpg files with the codec's tables, or streams without any.

    Raises:
      ValueError: no files.
    """
    files = list(files)
    if not files:
        raise ValueError("no files: `jpeglm check FILE...`")
    codec = codecs.make(config)
    layout = read_layout(codec.tables, codec.header)
    valid = True
    for file in files:
        try:
            verdict = diagnose(layout, codec.tables, Path(file).read_bytes())
        except OSError as error:
            print(f"{file}: cannot be read: {error.strerror or error}")
            valid = False
            continue
        print(f"{file}: {verdict}")
        valid = valid and verdict.valid
    return valid
