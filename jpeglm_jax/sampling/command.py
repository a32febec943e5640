"""`jpeglm sample`: from a run directory to .jpg files and a sheet of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jpeglm_jax import codecs, runs, tokenizer
from jpeglm_jax.data import pictures
from jpeglm_jax.sampling import sheets
from jpeglm_jax.sampling.complete import complete
from jpeglm_jax.sampling.rules import Sampler


def sample(
    run: str, prompt: str, ratio: float, seeds: Sequence[int], sampler: Sampler, max_tokens: int | None, out: str
) -> dict[str, Any]:
    """Writes a picture for each seed to OUT/sample_SEED.jpg, and the sheet OUT/samples.png.

    Raises:
      ValueError: no run or checkpoint, a prompt that is no picture, a ratio outside [0, 1], or nothing left to write.
      CheckpointError: the checkpoint cannot be read.
    """
    config = runs.read(run)
    codec = codecs.make(config.codec)
    # The prompt first: what is wrong with it shows before a model is loaded.
    stream, rows = np.zeros(0, np.uint8), {}
    if prompt:
        try:
            picture = pictures.load(Path(prompt).read_bytes(), config.codec.size)
        except (OSError, pictures.BadPicture) as error:
            raise ValueError(f"the prompt {prompt} cannot be read: {error}") from error
        whole = codec.encode(picture)
        stream = codec.prefix(whole, ratio)
        rows = {
            "original": [codec.decode(whole).picture],
            f"prompt: its first {ratio:.0%}": [codec.decode(stream).picture],
        }
    config, model, mesh, step = runs.load_model(run)
    vocabulary = tokenizer.load(config.tokenizer, codec.alphabet_size)
    limit = max_tokens or config.data.sequence_length
    with jax.set_mesh(mesh):
        samples = complete(model, codec, vocabulary, [stream] * len(seeds), seeds, sampler, limit)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    for seed, written in zip(seeds, samples):
        (directory / f"sample_{seed:04d}.jpg").write_bytes(codec.to_file(written.symbols))
    rows["completed" if prompt else "written from nothing"] = [written.picture for written in samples]
    Image.fromarray(sheets.sheet(rows)).save(directory / "samples.png")
    return {
        "step": step,
        "samples": len(samples),
        "that open": sum(written.opens for written in samples),
        "files": str(directory),
        "sheet": str(directory / "samples.png"),
    }
