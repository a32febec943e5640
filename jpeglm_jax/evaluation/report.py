"""What came of a run: likelihood against references, samples as files, and one sheet to look at."""

from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from jpeglm_jax import metrics, runs
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.evaluation import likelihood
from jpeglm_jax.sampling import complete, sheets
from jpeglm_jax.sampling.rules import Sampler

REFERENCE_PICTURES = 1000
"""Training pictures that the frequencies of the order-0 reference are taken from, at most."""


def report(run: str, count: int, ratio: float, sampler: Sampler) -> dict[str, Any]:
    """Evaluates the newest model of a run; leaves RUN/samples/*.jpg and RUN/samples.png.

    Args:
      count: pictures in each row of the sheet.
      ratio: part of a picture that its completion begins from.

    Raises:
      ValueError: no run, no checkpoint, or a ratio outside [0, 1).
      CheckpointError: the checkpoint cannot be read.
    """
    config, model, mesh, step = runs.load_model(run)
    run = config.run  # also where one of its checkpoints was given
    data = Data(config)
    grammar = complete.of(data.codec, data.tokenizer)
    batches = data.batches(data.held_out, epath.Path(run) / runs.LENGTHS)
    with jax.set_mesh(mesh):
        scores = likelihood.make_evaluate(data.tokenizer.lengths, grammar.tables)(model, batches, None)
        ours, free = (
            sheets.held_out_samples(model, data, grammar, constrained, count, ratio, sampler)
            for constrained in (True, False)
        )
    references = [data.stream(data.train, position) for position in range(min(REFERENCE_PICTURES, len(data.train)))]
    held_out = [data.stream(data.held_out, position) for position in range(len(data.held_out))]
    order_0 = likelihood.order_0(
        (stream for stream in references if stream is not None),
        (stream for stream in held_out if stream is not None),
        data.codec.alphabet_size,
    )

    directory = epath.Path(run) / "samples"
    directory.mkdir(exist_ok=True)
    kinds = {
        "completed": ours.completed,
        "invented": ours.invented,
        "unconstrained_completed": free.completed,
        "unconstrained_invented": free.invented,
    }
    for kind, samples in kinds.items():
        for number, sample in enumerate(samples):
            (directory / f"{kind}_{number:02d}.jpg").write_bytes(data.codec.to_file(sample.symbols))
    sheet = epath.Path(run) / "samples.png"
    with sheet.open("wb") as file:
        rows = {"real pictures": ours.real} | ours.rows() | free.rows(", without the grammar")
        Image.fromarray(sheets.sheet(rows)).save(file, "PNG")

    speeds = [line["speed/tokens_per_second"] for line in metrics.read(run) if "speed/tokens_per_second" in line]
    return {
        "steps": step,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "held_out_pictures": len(held_out),
        "bits_per_byte": scores["bits_per_byte"],
        "bits_per_byte_masked": scores.get("bits_per_byte_masked"),
        "impossible_mass": scores.get("impossible_mass"),
        "bits_per_byte_order_0": order_0,
        "bits_per_byte_uniform": float(np.log2(data.codec.alphabet_size)),
        "samples": len(ours.completed + ours.invented),
        "samples_that_open": ours.opening,
        "samples_that_open_unconstrained": free.opening,
        "sheet": str(sheet),
        "files": str(directory),
    }
