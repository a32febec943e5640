"""Symbols to token ids and back.

Two tokenizers with the same functions: `Symbols`, every symbol a token, and `Bpe`, byte pairs learned from pictures and
kept in the published format: a SentencePiece model over one character per byte, chr(byte + 10240) (paper, section 3.2).
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from jpeglm_jax import files

PAD, BOS, EOS = 0, 1, 2
SPECIALS = 3
"""Ids below this one are specials; the published tokenizer calls the first `<unk>`."""

DUMMY_PREFIX = "\u2581"
"""SentencePiece's mark of a space, which it puts before every text: every sequence starts `<s>`, `▁`."""

TRAINING_SENTENCE = 2**15
"""Characters in a sentence for the trainer, some versions of which keep positions in 16 bits."""


class Symbols:
    """Every symbol is a token: symbol s is id 3 + s."""

    def __init__(self, alphabet_size: int):
        self.alphabet_size = alphabet_size
        self.vocab_size = SPECIALS + alphabet_size

    @property
    def lengths(self) -> np.ndarray:
        """Number of symbols that each id spells, int32 (vocab_size,)."""
        return (np.arange(self.vocab_size) >= SPECIALS).astype(np.int32)

    @property
    def spellings(self) -> list[bytes]:
        """The bytes of each id; specials have none. Where the symbols are bytes."""
        assert self.alphabet_size == 256
        return [b""] * SPECIALS + [bytes([byte]) for byte in range(256)]

    def encode(self, symbols: np.ndarray, *, eos: bool = True) -> np.ndarray:
        """Ids of a picture, or of the beginning of one: without `eos`.

        Args:
          symbols: (length,), integers from 0 to alphabet_size - 1.
          eos: end with EOS.

        Returns:
          int32 (tokens,), BOS first.
        """
        return _frame(symbols.astype(np.int32) + SPECIALS, eos)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Symbols up to EOS or the end, (length,); specials and ids beyond the vocabulary spell nothing."""
        return (_content(ids, self.vocab_size) - SPECIALS).astype(np.min_scalar_type(self.alphabet_size - 1))

    def fingerprint(self) -> str:
        """Names the vocabulary: equal for tokenizers that give equal ids."""
        return f"{self.alphabet_size} symbols"

    def save(self, path: epath.PathLike) -> None:
        """Writes nothing: `load("", alphabet_size)` needs no file."""

    def published(self) -> bytes:
        """A SentencePiece model that gives the same ids to the text of a picture: no pairs, no dummy prefix.

        Where the symbols are bytes.
        """
        model = sentencepiece_model_pb2.ModelProto()
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
            model.pieces.add(piece=piece, score=0, type=kind)
        for byte in range(self.alphabet_size):
            model.pieces.add(piece=chr(0x2800 + byte), score=-byte, type=kinds.NORMAL)
        model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
        model.trainer_spec.vocab_size = self.vocab_size
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        return model.SerializeToString()


class Bpe:
    """Byte pairs, from a SentencePiece model in the published format."""

    def __init__(self, model: bytes):
        """Of the bytes of a `tokenizer.model` file.

        Raises:
          ValueError: not a SentencePiece model, or one with other specials or without all 256 bytes.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise ValueError("not a SentencePiece model: make one with `jpeglm tokenizer`") from error
        if (self._processor.bos_id(), self._processor.eos_id()) != (BOS, EOS):
            raise ValueError(f"not a tokenizer of pictures: <s> and </s> must have the ids {BOS} and {EOS}")
        ids = self._processor.piece_to_id([chr(0x2800 + byte) for byte in range(256)])
        missing = sum(map(self._processor.is_unknown, ids))
        if missing:
            raise ValueError(f"not a tokenizer of pictures: {missing} of the 256 bytes are not in its vocabulary")
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self._prefix = self._processor.piece_to_id(DUMMY_PREFIX)
        self.spellings = [_spell(self._processor.id_to_piece(id)) for id in range(self.vocab_size)]
        """The bytes of each id; specials and the dummy prefix have none."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of bytes that each id spells, int32 (vocab_size,)."""
        return np.array([len(piece) for piece in self.spellings], np.int32)

    def encode(self, symbols: np.ndarray, *, eos: bool = True) -> np.ndarray:
        """Ids of a picture, or of the beginning of one: without `eos`.

        Args:
          symbols: (length,), integers from 0 to 255.
          eos: end with EOS.

        Returns:
          int32 (tokens,), BOS and the dummy prefix first.
        """
        # SentencePiece puts no prefix before an empty text, but from it a picture is written from nothing.
        ids = self._processor.encode(_text(symbols), return_type="numpy") if len(symbols) else [self._prefix]
        return _frame(ids, eos)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Bytes up to EOS or the end, uint8 (length,); specials and ids beyond the vocabulary spell nothing."""
        content = _content(ids, self.vocab_size).tolist()
        return np.frombuffer(b"".join([self.spellings[id] for id in content]), np.uint8)

    def fingerprint(self) -> str:
        """Names the vocabulary: equal for tokenizers that give equal ids."""
        return f"SentencePiece {hashlib.sha256(self._model).hexdigest()}"

    def save(self, path: epath.PathLike) -> None:
        """Writes the file that `load` reads.

        If it is named `tokenizer.model`, transformers' `LlamaTokenizer.from_pretrained(directory, add_bos_token=True)`
        reads it too and gives the ids of `encode` without EOS.
        """
        files.write(path, self._model)

    def published(self) -> bytes:
        """The SentencePiece model, as it was read."""
        return self._model


def load(path: str, alphabet_size: int) -> Symbols | Bpe:
    """The tokenizer of a run.

    Args:
      path: a SentencePiece model; '' makes every symbol a token. May be gs://.
      alphabet_size: of the codec.

    Raises:
      ValueError: no such file, not a tokenizer of pictures, or a codec whose symbols are not bytes.
    """
    if not path:
        return Symbols(alphabet_size)
    if alphabet_size != 256:
        raise ValueError(f"{path} spells bytes, but the codec has {alphabet_size} symbols: leave tokenizer empty")
    try:
        return Bpe(epath.Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def train_bpe(streams: Iterable[np.ndarray], vocab_size: int, path: epath.PathLike) -> Bpe:
    """Learns byte pairs and writes them as a SentencePiece model.

    Ids are in the published order: 3 specials, the pairs as they were learned, the 256 bytes, the dummy prefix.

    Args:
      streams: uint8 (length,) each; read once.
      vocab_size: of the result, specials and dummy prefix included; 320 in the paper.
      path: of the file to write. May be gs://.

    Raises:
      ValueError: no streams, a vocabulary too small for the bytes, or one for which the streams have too few pairs.
    """
    smallest = SPECIALS + 256 + len(DUMMY_PREFIX)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (3 specials, 256 bytes, 1 prefix), not {vocab_size}")
    written = io.BytesIO()
    try:
        # The prefix is added below: learned like a character, it could merge with the first bytes of the header.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(streams),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size - 1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            max_sentence_length=4 * TRAINING_SENTENCE,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "Vocabulary size too high" not in str(error):
            raise  # also what the streams themselves raised
        raise ValueError(f"the pictures have too few byte pairs for vocab_size {vocab_size}: lower it") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    model.pieces.add(piece=DUMMY_PREFIX, score=model.pieces[-1].score - 1)
    model.normalizer_spec.add_dummy_prefix = True
    model.trainer_spec.vocab_size = vocab_size
    tokenizer = Bpe(model.SerializeToString())
    tokenizer.save(path)
    return tokenizer


def _sentences(streams: Iterable[np.ndarray]) -> Iterator[str]:
    # Each byte once, alone and so without a pair: the trainer leaves out characters that it never sees.
    yield from map(chr, range(0x2800, 0x2900))
    for stream in streams:
        for start in range(0, len(stream), TRAINING_SENTENCE):
            yield _text(stream[start : start + TRAINING_SENTENCE]).decode()


_bytes = np.arange(256)
_UTF8 = np.stack([np.full(256, 0xE2), 0xA0 | _bytes >> 6, 0x80 | _bytes & 0x3F], axis=1).astype(np.uint8).view("V3").ravel()
"""UTF-8 of chr(byte + 10240), three bytes as one opaque element: numpy takes those faster than rows of three."""


def _text(symbols: np.ndarray) -> bytes:
    return _UTF8.take(symbols).tobytes()


def _spell(piece: str) -> bytes:
    """The bytes of a piece; specials and the dummy prefix have none."""
    return bytes(ord(character) - 0x2800 for character in piece if 0x2800 <= ord(character) < 0x2900)


def _frame(content: Sequence[int] | np.ndarray, eos: bool) -> np.ndarray:
    ids = np.empty(1 + len(content) + eos, np.int32)
    ids[-1] = EOS
    ids[0] = BOS
    ids[1 : 1 + len(content)] = content
    return ids


def _content(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    ends = np.flatnonzero(ids == EOS)
    ids = ids[: ends[0]] if len(ends) else ids
    return ids[(ids >= SPECIALS) & (ids < vocab_size)]
