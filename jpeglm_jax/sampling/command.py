"""`jpeglm sample`: from a run directory to .jpg files and a sheet of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jpeglm_jax import codecs, runs, tokenizer
from jpeglm_jax.data import pictures
from jpeglm_jax.sampling import complete, live, sheets
from jpeglm_jax.sampling.rules import Sampler


def sample(
    run: str,
    prompt: str,
    ratio: float,
    seeds: Sequence[int],
    sampler: Sampler,
    max_tokens: int | None,
    constrained: bool,
    out: str,
    show: live.Show | None = None,
) -> dict[str, Any]:
    """Writes a picture for each seed to OUT/sample_SEED.jpg, and the sheet OUT/samples.png.

    Args:
      run: directory of a run, whose newest model is taken, or of one of its checkpoints.
      prompt: a picture file; empty to write from nothing.
      ratio: part of the prompt's MCUs that is kept.
      max_tokens: of a picture, prompt included; None is the run's sequence length, or what the shortest picture takes.
      constrained: under the codec's grammar: every picture opens, and ends inside `max_tokens`.
      show: where the pictures are seen while they are written; with it, the animation OUT/writing.gif is left too.

    Raises:
      ValueError: no run or checkpoint, a prompt that is no picture, a ratio outside [0, 1), or too few tokens.
      CheckpointError: the checkpoint cannot be read.
    """
    config = runs.read(runs.of_checkpoint(run)[0])
    codec = codecs.make(config.codec)
    # The prompt first: what is wrong with it shows before a model is loaded.
    stream, before, after = np.zeros(0, np.uint8), {}, {}
    if prompt:
        try:
            picture = pictures.load(Path(prompt).read_bytes(), config.codec.size)
        except (OSError, pictures.BadPicture) as error:
            raise ValueError(f"the prompt {prompt} cannot be read: {error}") from error
        whole = codec.encode(picture)
        stream = complete.beginning(codec, whole, ratio)
        before = {f"prompt: the first {ratio:.0%}": [codec.decode(stream).picture]}
        after = {"original": [codec.decode(whole).picture]}
    vocabulary = tokenizer.load(config.tokenizer, codec.alphabet_size)
    grammar = complete.of(codec, vocabulary)
    least = complete.least_tokens(vocabulary, stream, grammar)
    if max_tokens is not None and constrained and max_tokens < least:
        raise ValueError(f"max_tokens must be at least {least}, what the shortest picture takes, not {max_tokens}")
    if max_tokens is None:
        max_tokens = max(config.data.sequence_length, least)
    config, model, mesh, step = runs.load_model(run)
    with jax.set_mesh(mesh):
        prompts, only = [stream] * len(seeds), grammar if constrained else None
        watched = {"chunk": live.CHUNK, "look": live.follow(codec, prompts, show)} if show else {}
        samples = complete.complete(model, codec, vocabulary, prompts, seeds, sampler, max_tokens, only, **watched)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    for seed, written in zip(seeds, samples):
        (directory / f"sample_{seed:04d}.jpg").write_bytes(codec.to_file(written.symbols))
    rows = {"completed" if prompt else "written from nothing": [written.picture for written in samples]}
    Image.fromarray(sheets.sheet(before | rows | after)).save(directory / "samples.png")
    animation = {}
    if show:
        show(sheets.grid([written.picture for written in samples]))
        path = directory / "writing.gif"
        live.save_gif(path, live.frames(codec, [written.symbols for written in samples], ratio if prompt else 0.0))
        animation = {"animation": str(path)}
    return {
        "step": step,
        "samples": len(samples),
        "that open": sum(written.opens for written in samples),
        "impossible mass removed": float(np.mean([written.removed for written in samples])) if constrained else None,
        "files": str(directory),
        "sheet": str(directory / "samples.png"),
    } | animation
