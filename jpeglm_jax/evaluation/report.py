"""What came of a run: likelihood against references, samples as files, and one sheet to look at."""

from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from jpeglm_jax import metrics, runs
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.evaluation import likelihood
from jpeglm_jax.sampling import sheets
from jpeglm_jax.sampling.rules import Sampler

REFERENCE_PICTURES = 1000
"""Training pictures that the frequencies of the order-0 reference are taken from, at most."""


def report(run: str, count: int, ratio: float, sampler: Sampler) -> dict[str, Any]:
    """Evaluates the newest model of a run; leaves RUN/samples/*.jpg and RUN/samples.png.

    Args:
      count: pictures in each row of the sheet.
      ratio: part of a picture that its completion begins from.

    Raises:
      ValueError: no run, no checkpoint, or a ratio outside [0, 1].
      CheckpointError: the checkpoint cannot be read.
    """
    config, model, mesh, step = runs.load_model(run)
    data = Data(config)
    batches = data.batches(data.held_out, epath.Path(run) / runs.LENGTHS)
    with jax.set_mesh(mesh):
        scores = likelihood.make_evaluate(data.tokenizer.lengths)(model, batches, None)
        real, completed, invented = sheets.held_out_samples(
            model, data, count, ratio, sampler, config.data.sequence_length
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
    for kind, samples in (("completed", completed), ("invented", invented)):
        for number, sample in enumerate(samples):
            (directory / f"{kind}_{number:02d}.jpg").write_bytes(data.codec.to_file(sample.symbols))
    sheet = epath.Path(run) / "samples.png"
    with sheet.open("wb") as file:
        Image.fromarray(sheets.held_out_sheet(real, completed, invented, ratio)).save(file, "PNG")

    speeds = [line["speed/tokens_per_second"] for line in metrics.read(run) if "speed/tokens_per_second" in line]
    return {
        "steps": step,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "held_out_pictures": len(held_out),
        "bits_per_byte": scores["bits_per_byte"],
        "bits_per_byte_order_0": order_0,
        "bits_per_byte_uniform": float(np.log2(data.codec.alphabet_size)),
        "samples": len(completed) + len(invented),
        "samples_that_open": sum(sample.opens for sample in completed + invented),
        "sheet": str(sheet),
        "files": str(directory),
    }
