"""Pictures to batches, by random access: batch number b is a pure function of b and the seed.

Packed data sets usually are streams, whose state belongs to one count of hosts and workers. Here one pass over the pictures
stores how many tokens each has (`measure`); from the running sum of these lengths follows which pictures, from which token on,
make up any part of the concatenation. So the state of the data is one integer, the number of the next batch, and any number of
hosts can go on from it: each makes its own rows of the global batch and nothing else.
"""

import dataclasses
import functools
import io
import json
import sys
import zipfile
from collections.abc import Sequence

import grain
import numpy as np
import tqdm
from absl import flags
from etils import epath

from jpeglm_jax import files
from jpeglm_jax.tokenizer import PAD

WINDOW = 1000
"""Pictures among which the unreadable ones are counted."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some pictures of a source, in an order: those held out, or all others, shuffled anew for each epoch."""

    count: int
    """Pictures in the source."""
    holdout: int
    seed: int
    train: bool

    def __len__(self) -> int:
        return self.count - self.holdout if self.train else self.holdout

    def index(self, epoch: int, position: np.ndarray | int) -> np.ndarray | int:
        """The index in the source of the picture at a position of an epoch, or of many."""
        drawn = _permutation(self.count, self.seed)
        if not self.train:
            return drawn[position]
        return drawn[self.holdout + _permutation(len(self), self.seed, epoch)[position]]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, *seed: int) -> np.ndarray:
    # RandomState and not default_rng: numpy promises that its numbers never change, so a run can be resumed anywhere.
    random = np.random.RandomState(np.random.SeedSequence(seed).generate_state(4))
    return random.permutation(count).astype(np.int32)


class Rows:
    """One picture a row, padded or cut to T + 1 tokens; a picture that cannot be read leaves a row of padding."""

    def __init__(self, pictures: grain.MapDataset, selection: Selection, sequence_length: int):
        self.pictures, self.selection, self.sequence_length = pictures, selection, sequence_length

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.selection)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Rows `start` to `stop` of all epochs, int32 (stop - start, T + 1), and counts of pictures: all, and unreadable."""
        rows = np.full((stop - start, self.sequence_length + 1), PAD, np.int32)
        count = skipped = 0
        for row, number in zip(rows, range(start, stop)):
            epoch, position = divmod(number, len(self))
            if epoch and not self.selection.train:
                break
            tokens = self.pictures[int(self.selection.index(epoch, position))]
            count += 1
            if tokens is None:
                skipped += 1
            else:
                row[: len(tokens)] = tokens[: len(row)]
        return rows, count, skipped


class Chunks:
    """All pictures concatenated and cut every T tokens (paper, section 4.1); the end of an epoch is not a cut.

    A picture that can no longer be read, or has another length than when it was measured, is replaced by padding of the
    measured length, so that no other picture moves.
    """

    def __init__(self, pictures: grain.MapDataset, selection: Selection, sequence_length: int, lengths: np.ndarray):
        self.pictures, self.selection, self.sequence_length = pictures, selection, sequence_length
        self.lengths = lengths
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.epoch_tokens = int(self._layout(0)[1][-1])
        if not self.epoch_tokens:
            raise ValueError("none of the pictures can be read; the log above says why for each")

    def __len__(self) -> int:
        """Rows in an epoch, a last part counted whole."""
        return -(-self.epoch_tokens // self.sequence_length)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Rows `start` to `stop` of all epochs, int32 (stop - start, T + 1), and counts of pictures: all, and unreadable."""
        T = self.sequence_length
        # One token more than the rows hold: the target of the last.
        stream, count, skipped = self._read(start * T, stop * T + 1)
        return np.lib.stride_tricks.sliding_window_view(stream, T + 1)[::T], count, skipped

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, int, int]:
        """Tokens `start` to `stop` of the concatenation of all epochs."""
        tokens = np.full(stop - start, PAD, np.int32)
        count, skipped, place = 0, 0, start
        while place < stop:
            epoch, offset = divmod(place, self.epoch_tokens)
            if epoch and not self.selection.train:
                break
            indices, ends = self._layout(epoch)
            position = int(np.searchsorted(ends, offset, side="right"))
            length = int(self.lengths[indices[position]])
            begin = place - (offset - (int(ends[position]) - length))
            picture = self.pictures[int(indices[position])]
            end = min(begin + length, stop)
            count += 1
            if picture is not None and len(picture) == length:
                tokens[place - start : end - start] = picture[place - begin : end - begin]
            else:
                skipped += 1
            place = end
        return tokens, count, skipped

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of an epoch, the index of each picture in turn, and the token after each one's last."""
        if epoch not in self._layouts:
            indices = self.selection.index(epoch, np.arange(len(self.selection)))
            kept = {known: layout for known, layout in self._layouts.items() if known == epoch - 1}
            self._layouts = kept | {epoch: (indices, np.cumsum(self.lengths[indices], dtype=np.int64))}
        return self._layouts[epoch]


class Batches(grain.MapDataset):
    """Global batch after global batch, of which each host makes its own rows only.

    An element is a dict of `inputs` and `targets`, int32 (rows of this host, T), the target of a position being the token after
    its input; `pictures`, the number of pictures that it took; and `skipped`, how many of them could not be read.
    """

    def __init__(self, packing: Rows | Chunks, batch_size: int, share: Sequence[range]):
        """`share` is what this host makes of the rows 0 to `batch_size` of each global batch."""
        super().__init__(packing.pictures)
        self.packing, self.batch_size, self.share = packing, batch_size, share

    def __len__(self) -> int:
        return sys.maxsize if self.packing.selection.train else -(-len(self.packing) // self.batch_size)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return self.slice(number)
        first = number * self.batch_size
        parts = [self.packing.rows(first + part.start, first + part.stop) for part in self.share]
        rows = np.concatenate([rows for rows, _, _ in parts])
        count, skipped = (sum(part[i] for part in parts) for i in (1, 2))
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:], "pictures": count, "skipped": skipped}


class Lengths(grain.MapDataset):
    """The number of tokens of each picture; 0 for one that cannot be read."""

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        tokens = self._parent[index]
        return 0 if tokens is None else len(tokens)


class Unreadable:
    """Counts pictures, and refuses to go on where too many cannot be read: then it is the source that is broken."""

    def __init__(self, allowed: float):
        """`allowed` is the part of each WINDOW pictures, one after the other, that may be unreadable."""
        self.allowed, self.count, self.skipped = allowed, 0, 0

    def add(self, count: int, skipped: int) -> None:
        """Takes `count` more pictures, of which `skipped` could not be read.

        Raises:
          RuntimeError: with them there are too many.
        """
        self.count, self.skipped = self.count + count, self.skipped + skipped
        if self.skipped > self.allowed * max(self.count, WINDOW):
            raise RuntimeError(
                f"{self.skipped} of {self.count} pictures cannot be read, the log says why for each; that is more than "
                f"{self.allowed:.0%} of {max(self.count, WINDOW)}: see to the source, or raise data.max_unreadable"
            )
        if self.count >= WINDOW:
            self.count = self.skipped = 0


def measure(pictures: grain.MapDataset, threads: int, workers: int, allowed: float) -> np.ndarray:
    """Reads every picture once, with a progress bar; returns the tokens of each, int32 (pictures,).

    Raises:
      RuntimeError: more of them are unreadable than the part `allowed`, as `Unreadable` counts.
    """
    unreadable = Unreadable(allowed)
    lengths = np.empty(len(pictures), np.int32)
    measured = iterate(Lengths(pictures), threads, workers)
    for index, length in enumerate(tqdm.tqdm(measured, "measuring", len(pictures), unit=" pictures")):
        lengths[index] = length
        unreadable.add(1, length == 0)
    return lengths


def iterate(dataset: grain.MapDataset, threads: int, workers: int) -> grain.IterDataset:
    """Elements in order, made ahead of time."""
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    elements = dataset.to_iter_dataset(read)
    if not workers:
        return elements
    if not flags.FLAGS.is_parsed():  # Grain's workers read its flags, which only absl programs parse
        flags.FLAGS.mark_as_parsed()
    return elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def save_lengths(path: epath.PathLike, lengths: np.ndarray, identity: dict[str, str]) -> None:
    """Writes lengths, and what they are lengths of, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, lengths=lengths, identity=json.dumps(identity))
    files.write(path, buffer.getvalue())


def load_lengths(path: epath.PathLike, identity: dict[str, str]) -> np.ndarray:
    """Reads lengths.

    Raises:
      ValueError: the file is damaged, or holds the lengths of other pictures or tokens.
    """
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as stored:
            lengths, found = stored["lengths"], json.loads(str(stored["identity"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a length index ({error}); delete it to have it made anew") from error
    changed = [name for name in identity if found.get(name) != identity[name]]
    if changed:
        raise ValueError(
            f"{path} was made with another {', '.join(changed)}; delete it to have it made anew (a run that began with it "
            "cannot be continued then)"
        )
    return lengths
