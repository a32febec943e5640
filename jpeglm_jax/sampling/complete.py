"""Pictures written by a model: from nothing, or from the beginning of a picture."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.generate import generate
from jpeglm_jax.sampling.rules import Sampler


@dataclasses.dataclass(frozen=True)
class Sample:
    """One written picture."""

    symbols: np.ndarray
    """The stream, prompt included."""
    picture: np.ndarray
    """uint8 (size, size, 3); grey where nothing could be read."""
    lost: str
    """What could not be read of it; empty when the file is whole."""
    opens: bool
    """Pillow opens the file without an error, and nothing of it is lost."""


def complete(
    model: Llama,
    codec,
    tokenizer,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    batch_size: int = 64,
) -> list[Sample]:
    """Writes on from each prompt, inside `jax.set_mesh` of the model's mesh.

    Args:
      prompts: the first symbols of a picture each, as `codec.prefix` cuts them; empty to write from nothing.
      seeds: of each prompt.
      max_tokens: of a whole picture, prompt included; a picture that is longer is cut.
      batch_size: pictures written at the same time.

    Raises:
      ValueError: a prompt that leaves no room in `max_tokens`.
    """
    samples = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        ids = [tokenizer.encode(prompt, eos=False) for prompt in prompts[part]]
        written = generate(model, ids, seeds[part], sampler, max_tokens)
        samples += [read_sample(codec, tokenizer.decode(tokens)) for tokens in written]
    return samples


def read_sample(codec, symbols: np.ndarray) -> Sample:
    """Reads what a model wrote."""
    decoded = codec.decode(symbols)
    return Sample(symbols, decoded.picture, decoded.lost, not decoded.lost and _opens(codec.to_file(symbols)))


def _opens(file: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
    except Exception:  # Pillow's readers raise nearly any type on a damaged file
        return False
    return True
