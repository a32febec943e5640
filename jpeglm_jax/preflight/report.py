"""`jpeglm preflight`: the table of a run on slices of TPUs."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm
from PIL import Image

from jpeglm_jax import config as configs
from jpeglm_jax import metrics, tokenizer
from jpeglm_jax.benchmarks import input
from jpeglm_jax.config import Config
from jpeglm_jax.data.flags import flag
from jpeglm_jax.preflight.slices import GENERATIONS, Topology, topology

log = logging.getLogger(__name__)

PICTURES = 100
"""That the input pipeline is measured with."""

TOGETHER = 2
"""Compilations at the same time; each takes about 1 GB and most of a core."""


def preflight(config: Config, names: Sequence[str], mfu: float) -> tuple[dict[str, dict[str, Any]], bool]:
    """Compiles the run's programs for each slice, and measures its input pipeline on one core of this machine.

    Neither the run's pictures nor its tokenizer need to be at hand: photos that come with scikit-image or scikit-learn, or
    else flags, and a vocabulary learned from them, take their place.

    Args:
      names: of slices, as `slices.topology` takes them.
      mfu: the part of the chips' peak at which the days of a run, and the pictures it needs, are reckoned.

    Returns:
      Rows by slice, and whether everything fits.

    Raises:
      ValueError: an unknown slice, a mesh or a batch that does not divide over one, or no libtpu.
      RuntimeError: the compiler failed.
    """
    slices = [topology(name) for name in names]
    check_compiler()
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, not {mfu}")
    with tempfile.TemporaryDirectory() as scratch:
        prepared = input.prepare(config, _pictures(config), PICTURES, Path(scratch))
        config = prepared[2] if config.tokenizer else prepared[1]
        speed = input.one_core(config, PICTURES)
        vocab_size = config.model.vocab_size or tokenizer.load(config.tokenizer, 256).vocab_size
        model = dataclasses.replace(config.model, attention="splash", vocab_size=vocab_size)
        config = dataclasses.replace(config, model=model)
        figures = _compile_all(config, slices)
    columns = {
        where.name: _column(config, where, figures[where, "train"], figures[where, "decode"], mfu, *speed) for where in slices
    }
    return columns, all(each["excess"] is None for each in figures.values())


def _pictures(config: Config) -> Iterator[bytes]:
    """Those of the run where they are here, else photos, else flags."""
    try:
        yield from input.picture_files(config)
    except (ValueError, OSError):
        stand_in = dataclasses.replace(config, data=dataclasses.replace(config.data, path="builtin:flags"))
        try:
            yield from input.picture_files(stand_in)
        except ValueError:
            log.warning("no photos to measure the input with (pip install scikit-image): flags are smaller and faster")
            for index in range(PICTURES):
                yield input.file(Image.fromarray(flag(index, config.codec.size)))


def _compile_all(config: Config, slices: Sequence[Topology]) -> dict[tuple[Topology, str], dict[str, Any]]:
    jobs = [(where, program) for where in slices for program in ("train", "decode")]
    with (
        concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool,
        tqdm.tqdm(total=len(jobs), desc="compiling", unit=" programs", dynamic_ncols=True) as bar,
    ):
        futures = {job: pool.submit(compile_program, config, *job) for job in jobs}
        try:
            for _ in concurrent.futures.as_completed(futures.values()):
                bar.update()
            return {job: future.result() for job, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def check_compiler() -> None:
    """Whether there is a TPU compiler.

    Raises:
      ValueError: there is none; the message says how to get it.
    """
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "preflight compiles with libtpu, which is not installed: pip install 'jpeglm_jax[preflight]', which needs no TPU "
            "(set JAX_PLATFORMS=cpu for the other commands then), or let TPU_LIBRARY_PATH name a libtpu.so"
        )


def compile_program(config: Config, where: Topology, program: str) -> dict[str, Any]:
    """Figures of one of the programs in `compiling.PROGRAMS`, compiled in a process of its own."""
    request = {"config": configs.to_json(config), "topology": where.name, "program": program}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not look for the machine's TPU
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-m", "jpeglm_jax.preflight.compiling"],
        input=json.dumps(request), capture_output=True, text=True, env=environment,
    )  # fmt: skip
    try:
        figures = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no message")
        raise RuntimeError(f"the compiler failed for the {program} program on {where.name}: {last[:500]}") from None
    if "error" in figures:
        raise ValueError(f"{where.name}: {figures['error']}")
    return figures


def _column(
    config: Config, where: Topology, step: dict, decode: dict, mfu: float, pictures_per_second: float, tokens_per_picture: float
) -> dict[str, Any]:
    """What stands below a slice's name."""
    chip, data = GENERATIONS[where.generation], config.data
    tokens = data.batch_size * data.sequence_length
    flops = metrics.train_flops(config.model, tokens, data.sequence_length)
    hosts = where.chips // 4
    rows: dict[str, Any] = {
        "chips, hosts": f"{where.chips}, {step.get('hosts', hosts)}",
        "rows a chip x parts": f"{data.batch_size // where.chips // step.get('parts', 1) or 1} x {step.get('parts', 1)}",
        "training fits": _fits(step, chip.hbm),
        "sampling fits": _fits(decode, chip.hbm),
    }
    if step["excess"] is not None:
        return rows
    attention = _attention_flops(config, tokens)
    again = config.model.remat == "full"
    # Forward two products, backward seven, as the kernel makes the scores anew for queries and for keys and values.
    kernels = attention * (4.5 + again)
    clock = chip.flops / chip.flops_per_cycle
    arithmetic = (flops + again * flops / 3) / where.chips / chip.flops
    # Parameters, two moments and gradients, float32, are read and written; the inputs of the layers are written and read.
    inputs = tokens / where.chips * config.model.layers * config.model.width * 2
    bandwidth = (step["state"] * 2**30 * 8 / 3 + 2 * inputs) / chip.bandwidth
    rows |= {
        "peak, GiB a chip": step["peak"],
        "of it parameters and optimizer": step["state"],
        "PFLOP a step (formula)": flops / 1e15,
        "floor by arithmetic, s a step": arithmetic,
        "floor by HBM, s a step": bandwidth,
    }
    floor = max(arithmetic, bandwidth)
    if step["cycles"] is not None:
        whole = step["cycles"] / clock + kernels / where.chips / chip.flops
        floor = max(floor, whole)
        rows |= {
            "compiler's cycles a step, 1e9": step["cycles"] / 1e9,
            "the same in s, and attention at peak": whole,
        }
    for kind, gib in sorted(step["collectives"].items()):
        rows[f"{kind}, GiB a chip"] = gib
    per_second = mfu * where.chips * chip.flops / flops * tokens
    needed = per_second / tokens_per_picture / step["hosts"]
    rows |= {
        "MFU at most": flops / where.chips / chip.flops / floor,
        f"days at MFU {mfu:.0%}": config.train.steps * tokens / per_second / 86400,
        f"chip-hours at MFU {mfu:.0%}": config.train.steps * tokens / per_second / 3600 * where.chips,
        "pictures/s a host needs": needed,
        "cores for them, of vCPUs": f"{math.ceil(needed / pictures_per_second)} of {chip.host_cpus}",
        "compile time here, s": step["compile_seconds"],
    }
    if decode["excess"] is None:
        rows |= {
            "sampling, pictures at a time": decode["batch"],
            "sampling, GiB a chip": decode["peak"],
        }
    return rows


def _fits(figures: dict[str, Any], hbm: float) -> str:
    if figures["excess"] is not None:
        return "NO" + ("" if math.isnan(figures["excess"]) else f", {figures['excess']:.1f} GiB too much")
    return f"yes, {hbm - figures['peak']:.1f} of {hbm} GiB free"


def _attention_flops(config: Config, tokens: int) -> float:
    """Scores and values of a forward pass, half of the square."""
    model = config.model
    return 2.0 * tokens * model.layers * model.heads * model.head_dim * config.data.sequence_length

