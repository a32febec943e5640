"""Representations of pictures as symbols, one module each.

A module `NAME.py` defines `Codec`, made from the config whose `name` is NAME, with
  `alphabet_size`: symbols are integers from 0 to `alphabet_size - 1`;
  `encode(picture) -> symbols`: uint8 (size, size, 3) to a 1-D unsigned integer array;
  `decode(symbols) -> Decoded`: also of damaged or cut input, saying what was lost; never raises on any symbols;
  `prefix(symbols, ratio) -> symbols`: the beginning, cut where the format may be cut;
  `describe() -> str`: one line for people.
The contract tests walk this package, so a new module is covered unasked. No codec imports jax.
"""

import dataclasses
import importlib
import pkgutil

import numpy as np


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A picture and what is missing from it."""

    picture: np.ndarray
    """uint8 (size, size, 3)."""
    lost: str
    """What could not be read, for people; empty when the stream was whole."""


def names() -> list[str]:
    """Every codec of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(config):
    """The codec that `config.name` names.

    Raises:
      ValueError: there is no such codec; the message lists those there are.
    """
    if config.name not in names():
        raise ValueError(f"no codec named {config.name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{config.name}").Codec(config)
