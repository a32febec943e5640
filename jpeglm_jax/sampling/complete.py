"""Pictures written by a model: from nothing, or from the beginning of a picture."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jpeglm_jax import tokenizer
from jpeglm_jax.grammar import Grammar, make
from jpeglm_jax.grammar.diagnose import diagnose
from jpeglm_jax.grammar.layout import read_layout
from jpeglm_jax.grammar.tokens import shortest
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.generate import CHUNK, Request, Written, generate
from jpeglm_jax.sampling.rules import Sampler

SLOTS = 64
"""Pictures that are written at the same time."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One written picture."""

    symbols: np.ndarray
    """The stream, prompt included."""
    picture: np.ndarray
    """uint8 (size, size, 3); grey where nothing could be read."""
    problem: str
    """Where and why the stream is not one that the encoder can write; empty if it is."""
    removed: float
    """Probability that the grammar took from impossible tokens, mean of the written ones; 0 without it."""

    @property
    def opens(self) -> bool:
        """The file opens in the strictest decoder: Pillow's hides warnings."""
        return not self.problem


def complete(
    model: Llama,
    codec,
    vocabulary: tokenizer.Symbols | tokenizer.Bpe,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    grammar: Grammar | None,
    slots: int = SLOTS,
    chunk: int = CHUNK,
    look: Callable[[dict[int, np.ndarray]], None] | None = None,
) -> list[Sample]:
    """Writes on from each prompt, inside `jax.set_mesh` of the model's mesh.

    Args:
      prompts: the first symbols of a picture each, as `beginning` cuts them; empty to write from nothing.
      seeds: of each prompt.
      max_tokens: of a whole picture, prompt included. With a grammar every picture ends by then; else it is cut.
      grammar: of `of`; None lets the model write anything.
      slots: pictures that are written at the same time.
      chunk: steps between two looks, at most.
      look: gets the streams that have grown, by the number of their prompt.

    Raises:
      ValueError: a prompt that no stream of the codec begins with, that is a whole picture, or that leaves no room.
    """
    pairs = zip(prompts, seeds, strict=True)
    requests = [request(vocabulary, prompt, seed, max_tokens, grammar) for prompt, seed in pairs]

    def read(changed: dict[int, Written]) -> None:
        look({number: vocabulary.decode(picture.tokens) for number, picture in changed.items()})

    tables = grammar and grammar.tables
    written = generate(model, requests, sampler, tables, slots, chunk, read if look else None)
    return [read_sample(codec, vocabulary.decode(picture.tokens), picture.removed) for picture in written]


def of(codec, vocabulary: tokenizer.Symbols | tokenizer.Bpe) -> Grammar:
    """The grammar of a codec over a vocabulary; errors as of `grammar.make`."""
    return make(codec, vocabulary.spellings, tokenizer.EOS)


def request(
    vocabulary: tokenizer.Symbols | tokenizer.Bpe,
    prompt: np.ndarray,
    seed: int,
    max_tokens: int,
    grammar: Grammar | None,
) -> Request:
    """What the loop needs to know of a prompt; arguments and errors as of `complete`."""
    ids = vocabulary.encode(prompt, eos=False)
    if grammar is None:
        return Request(ids, seed, max_tokens)
    try:
        state, left = grammar.walk(prompt.tobytes())
    except ValueError as error:
        raise ValueError(f"the prompt is not the beginning of a picture of this codec: {error}") from error
    if not left:
        raise ValueError("the prompt is a whole picture: nothing is left to write; keep a smaller part of it")
    return Request(ids, seed, max_tokens, state, left)


def least_tokens(vocabulary: tokenizer.Symbols | tokenizer.Bpe, prompt: np.ndarray, grammar: Grammar) -> int:
    """Tokens of the shortest picture that begins with a prompt, BOS and EOS included."""
    start = request(vocabulary, prompt, 0, 0, grammar)
    return len(start.prompt) + int(shortest(grammar.tables, start.state, start.left))


def beginning(codec, symbols: np.ndarray, ratio: float) -> np.ndarray:
    """The prompt that is a part of a picture.

    Args:
      symbols: the stream of the picture.
      ratio: of its MCUs, from 0, which keeps the header alone, to below 1.

    Raises:
      ValueError: a ratio outside [0, 1), or a codec without restart markers.
    """
    prompt = codec.prefix(symbols, ratio)
    if len(prompt) == len(symbols):
        raise ValueError(f"ratio {ratio} keeps the whole picture: nothing is left to write; take one below 1")
    return prompt


def read_sample(codec, symbols: np.ndarray, removed: float = 0.0) -> Sample:
    """Reads what a model wrote."""
    verdict = diagnose(read_layout(codec.tables, codec.header), codec.tables, symbols.tobytes())
    return Sample(symbols, codec.decode(symbols).picture, "" if verdict.valid else str(verdict), removed)
