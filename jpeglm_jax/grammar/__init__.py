"""Which byte, or token, may come next in a stream that a JPEG codec can have written.

`layout` reads from the codec what its streams have in common; `automaton` is the exact automaton over bytes; `tokens`
lifts it to a vocabulary and knows the shortest end; `diagnose` says in words why a file is not such a stream; `cache`
keeps the tables on disk. All numpy: a sampler moves `Grammar.tables` to its device and calls `tokens.allowed` and
`tokens.advance`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from jpeglm_jax.codecs import jpeg
from jpeglm_jax.grammar.automaton import Automaton, Effect, build, start_of, walk
from jpeglm_jax.grammar.cache import cached, directory
from jpeglm_jax.grammar.layout import Layout, read_layout
from jpeglm_jax.grammar.tokens import Tables, check_vocabulary, tabulate


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The streams of a codec, over bytes and over the tokens of a vocabulary. Both have the same states."""

    layout: Layout
    automaton: Automaton
    """Over bytes, header included."""
    tables: Tables
    """Over tokens."""

    def walk(self, data: bytes) -> tuple[int, int]:
        """State and MCUs left after the first bytes of a stream; errors as of `automaton.walk`."""
        return walk(self.automaton, self.layout, data)


def bytewise(
    codec: jpeg.Codec, *, caps: bool = False, folder: pathlib.Path | None = None
) -> tuple[Layout, Automaton]:
    """What a codec's streams have in common, and their automaton, header included; arguments as of `make`."""
    layout = read_layout(codec.tables, codec.header, caps=caps)
    assert layout.mcus == codec.mcu_count

    def build_arrays() -> dict[str, np.ndarray]:
        built = build(layout)
        return {"next": built.next, "effect": built.effect, "effects": np.array(built.effects)}

    # Neither size nor quality is in the key: they are in the header and the count of MCUs.
    kept = cached(folder or directory(), "bytes", (layout.blocks, layout.restart), build_arrays)
    effects = tuple(Effect(*row) for row in kept["effects"].tolist())
    return layout, Automaton(kept["next"], kept["effect"], effects).after(layout.header)


def make(
    codec: jpeg.Codec, spellings: Sequence[bytes], eos: int, *, caps: bool = False, folder: pathlib.Path | None = None
) -> Grammar:
    """The grammar of a codec's streams over a vocabulary; from the cache in well under a second, else in several.

    Args:
      codec: whose encoder's streams are meant.
      spellings: the bytes of each token id; b"" for ids that spell nothing (specials, a dummy prefix): never open.
      eos: id of the token that ends a picture.
      caps: bound magnitudes by what the quantiser can make of 8-bit samples, not only by what Huffman codes can say.
      folder: of the cache; None is the user's.

    Raises:
      ValueError: the vocabulary cannot spell every stream: a byte is missing, or eos is not an id that spells nothing.
    """
    layout, automaton = bytewise(codec, caps=caps, folder=folder)
    check_vocabulary(spellings, eos)

    def build_arrays() -> dict[str, np.ndarray]:
        tables = tabulate(automaton, start_of(automaton, layout), layout.mcus, spellings, eos)
        return dict(zip(Tables._fields, map(np.asarray, tables)))

    kept = cached(folder or directory(), "tokens", (layout, list(spellings), eos), build_arrays)
    tables = Tables(*(kept[name] if kept[name].ndim else int(kept[name]) for name in Tables._fields))
    return Grammar(layout, automaton, tables)
