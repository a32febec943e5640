"""From a source of pictures to batches of tokens: one visible Grain chain, by random access from end to end."""

import dataclasses
import functools
import logging
import random
import time
from collections.abc import Sequence

import grain
import numpy as np
import tqdm
from etils import epath

from jpeglm_jax import codecs, tokenizer
from jpeglm_jax.config import Config
from jpeglm_jax.data import packing, pictures
from jpeglm_jax.data.sources import Source, open_source

log = logging.getLogger(__name__)


PROBED = 1000
"""Training pictures that are read to learn how long a row must be."""

ROW_MULTIPLE = 16
"""Rows have a multiple of this many tokens, which processors like better."""


class Data:
    """The data of a run. `config` is what was asked for, with the sequence length filled in.

    Raises:
      ValueError: nothing to read at `data.path`, fewer than two pictures, or no such tokenizer.
    """

    def __init__(self, config: Config):
        self.config = config.data
        self.codec = codecs.make(config.codec)
        self.tokenizer = tokenizer.load(config.tokenizer, self.codec.alphabet_size)
        self.source = open_source(config.data.path, config.data.split)
        count = len(self.source)
        if count < 2:
            raise ValueError(f"{config.data.path} has 1 picture; at least 2 are needed, of which one is held out")
        holdout = min(config.data.holdout, max(1, count // 10))
        self.train, self.held_out = (
            packing.Selection(count, holdout, config.data.seed, train) for train in (True, False)
        )
        self.pictures = (
            grain.MapDataset.range(count)
            .map(ReadPicture(self.source, config.codec.size))  # decode, centre square, resize
        )
        self.symbols = self.pictures.map(self.codec.encode)
        self.tokens = self.symbols.map(functools.partial(self.tokenizer.encode, eos=True))
        if config.data.packing == "rows":
            self.config = dataclasses.replace(config.data, sequence_length=self._row_length())

    def stream(self, selection: packing.Selection, position: int) -> np.ndarray | None:
        """The symbols of one picture of a selection's first epoch; None if it cannot be read."""
        return self.symbols[int(selection.index(0, position))]

    def batches(
        self, selection: packing.Selection, lengths_path: epath.PathLike, share: Sequence[range] | None = None
    ) -> packing.Batches:
        """Batches of a selection by number; measures the pictures first if they are to be cut in chunks and were not yet.

        Args:
          share: the rows of each batch that are made; None makes all.
        """
        T = self.config.sequence_length
        if self.config.packing == "rows":
            packed = packing.Rows(self.tokens, selection, T)
        else:
            packed = packing.Chunks(self.tokens, selection, T, self.lengths(lengths_path))
        batch_size = self.config.batch_size
        return packing.Batches(packed, batch_size, [range(batch_size)] if share is None else share)

    def iterate(self, batches: packing.Batches, start: int = 0) -> grain.IterDataset:
        """Batches from number `start` on, made ahead of time by threads or worker processes."""
        return packing.iterate(batches[start:], self.config.threads, self.config.workers)

    def _row_length(self) -> int:
        """The sequence length that was asked for, or else one that holds the pictures."""
        probed = (self.tokens[int(self.train.index(0, position))] for position in range(min(PROBED, len(self.train))))
        # A row's inputs are all tokens of a picture but its last.
        needed = np.array([len(tokens) - 1 for tokens in probed if tokens is not None])
        if not len(needed):
            raise ValueError(f"none of the first {PROBED} pictures of {self.config.path} can be read; the log says why for each")
        fitting = -(-int(needed.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
        asked = self.config.sequence_length or fitting
        if longer := int((needed > asked).sum()):
            log.warning(
                "%d of %d pictures have more tokens than data.sequence_length (%d) and are cut; %d would hold them",
                *(longer, len(needed), asked, fitting),
            )
        return asked

    def lengths(self, path: epath.PathLike) -> np.ndarray:
        """Tokens of each picture, int32 (pictures,), from the index at `path`, which is made if it is missing."""
        if not epath.Path(path).exists():
            self.save_lengths(path, self.measure(0, len(self.source)))
        return packing.load_lengths(path, self.identity())

    def measure(self, start: int, stop: int) -> np.ndarray:
        """Tokens of some pictures, int32 (stop - start,), from reading them.

        Raises:
          RuntimeError: too many are unreadable; see `data.max_unreadable`.
        """
        return packing.measure(
            self.tokens[start:stop], self.config.threads, self.config.workers, self.config.max_unreadable
        )

    def save_lengths(self, path: epath.PathLike, lengths: np.ndarray) -> None:
        """Makes the index at `path` of the tokens of all pictures."""
        if unreadable := int((lengths == 0).sum()):
            log.warning("%d of %d pictures cannot be read and are left out", unreadable, len(lengths))
        packing.save_lengths(path, lengths, self.identity())

    def identity(self) -> dict[str, str]:
        """What decides which tokens stand where; a run is continued only on the same."""
        return {
            "set of pictures": self.source.fingerprint(),
            "codec": self.codec.describe(),
            "tokenizer": self.tokenizer.fingerprint(),
        }


PAUSES = 0.5, 1.0, 2.0, 4.0, 8.0
"""Seconds before a source is asked again for a picture that it failed to give, up to twice as long each."""


class ReadPicture:
    """Index to uint8 (size, size, 3), or None, logged, for a picture that cannot be read."""

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size

    def __call__(self, index: int) -> np.ndarray | None:
        try:
            return pictures.load(self._fetch(index), self.size)
        except pictures.BadPicture as error:
            log.warning("skipped %s: %s", self.source.name(index), error)
            return None

    def _fetch(self, index: int) -> bytes | np.ndarray:
        """What the source has; what it says of itself is bad is final, all other failures may be passing ones."""
        for pause in (*PAUSES, None):
            try:
                return self.source[index]
            except pictures.BadPicture:
                raise
            except Exception as error:  # network file systems raise nearly any type
                reason = " ".join(str(error).split()) or type(error).__name__
                if pause is None:
                    raise pictures.BadPicture(f"cannot be read, tried {1 + len(PAUSES)} times: {reason}") from error
                log.warning("%s: %s; trying again", self.source.name(index), reason)
                time.sleep(pause * random.uniform(1, 2))  # not all hosts at once


def learn_tokenizer(config: Config, pictures: int, vocab_size: int, path: epath.PathLike) -> tuple[tokenizer.Bpe, float]:
    """Learns BPE from the first training pictures and writes it; returns it and the part of a picture's length that it saves.

    Raises:
      ValueError: a vocabulary too small for the bytes or too large for the pictures.
    """
    data = Data(dataclasses.replace(config, tokenizer=""))
    count = min(pictures, len(data.train))
    streams = [
        stream
        for position in tqdm.tqdm(range(count), "reading", unit=" pictures")
        if (stream := data.stream(data.train, position)) is not None
    ]
    learned = tokenizer.train_bpe(streams, vocab_size, path)
    sample = streams[:1000]
    saved = 1 - sum(len(learned.encode(stream, eos=True)) for stream in sample) / sum(len(stream) + 2 for stream in sample)
    return learned, saved
