"""Tokens a second of sampling, what the grammar costs, and how near a step is to the speed of the memory."""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jpeglm_jax import codecs, hf, sharding, tokenizer
from jpeglm_jax.config import Config, MeshConfig
from jpeglm_jax.grammar.tokens import Tables
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.sampling import complete, generate
from jpeglm_jax.sampling.rules import Sampler

COPY_BYTES = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}
"""Size of the array that is read and written: far beyond any cache."""


def bench_decode(config: Config, batches: Sequence[int], length: int, steps: int, rounds: int) -> dict[str, Any]:
    """Decodes with random weights on the first device: with the grammar, without it, and beside them a large copy.

    Every step is the one that `jpeglm sample` takes, in the middle of a cache of `length` positions. A step must read
    the weights and the half of the cache that is in use; the fraction of the bandwidth is these bytes, over the time of
    a step, over the bandwidth of the copy (which reads and writes, in place). Weights are made in the type in which
    they are used.

    Args:
      batches: pictures written at the same time, each measured.
      length: positions of the cache; 0 takes the config's sequence length, or 4096.
      steps: in a round, 1 to 128.
      rounds: of each loop and the copy, in turn; times are medians.

    Raises:
      ValueError: a count that cannot be.
    """
    length = length or config.data.sequence_length or 4096
    if rounds < 1 or not 1 <= steps <= generate.CHUNK or min(batches, default=0) < 1 or length < 2 * steps:
        raise ValueError(
            f"rounds ({rounds}) and batches {tuple(batches)} must be 1 or more, "
            f"steps ({steps}) from 1 to {generate.CHUNK}, and length ({length}) at least twice the steps"
        )
    codec = codecs.make(config.codec)
    vocabulary = tokenizer.load(config.tokenizer, codec.alphabet_size)
    tables = complete.of(codec, vocabulary).tables
    device = jax.devices()[0]
    model_config = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocabulary.vocab_size)
    rows: dict[str, Any] = {"device": device.device_kind}
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=1), [device])):
        model = jax.jit(lambda: in_dtype(Llama(model_config, nnx.Rngs(0))))()
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        rows |= {"weights_gib": weights / 2**30, "positions": length}
        for batch in batches:
            try:
                measured = _measure(model, jax.device_put(tables), batch, length, steps, rounds, weights)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                rows[f"tokens_per_second_at_{batch}"] = "does not fit on the device"
                continue
            rows |= measured | _transformers(model, batch, length, steps, measured[f"tokens_per_second_at_{batch}"])
    return rows


def _measure(
    model: Llama, tables: Tables, batch: int, length: int, steps: int, rounds: int, weights: int
) -> dict[str, Any]:
    slots = generate.empty_slots(model, batch, length)

    def loop(tables: Tables | None) -> None:
        nonlocal slots
        slots = _in_the_middle(slots, tables, length)
        # More than there are slots: that many are never done.
        slots, _ = generate.run_chunk(model, tables, Sampler(), slots, np.int32(batch + 1), np.int32(steps))
        jax.block_until_ready(slots.token_B)

    array = jnp.zeros(COPY_BYTES[jax.default_backend()] // 4)
    through = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> None:
        nonlocal array
        array = jax.block_until_ready(through(array))

    masked, free, copied = _in_turn([lambda: loop(tables), lambda: loop(None), copy], rounds)
    bandwidth = 2 * array.nbytes / copied
    live = sum(leaf.nbytes for leaf in slots.cache) // 2
    return {
        f"tokens_per_second_at_{batch}": batch * steps / masked,
        f"step_ms_at_{batch}": 1e3 * masked / steps,
        f"masked_over_unmasked_at_{batch}": masked / free,
        f"live_cache_gib_at_{batch}": live / 2**30,
        f"copy_gb_per_second_at_{batch}": bandwidth / 1e9,
        f"fraction_of_bandwidth_at_{batch}": (weights + live) * steps / masked / bandwidth,
    }


def _in_the_middle(slots: generate.Slots, tables: Tables | None, length: int) -> generate.Slots:
    """Slots that have written half of the cache and are to write the rest."""
    like = slots.position_B
    state, left = (0, 0) if tables is None else (tables.start, tables.mcus)
    values = {"position_B": length // 2, "limit_B": length, "state_B": state, "left_B": left, "begin_B": left}
    vectors: dict[str, Array] = {name: jnp.zeros_like(like) + value for name, value in values.items()}
    return slots._replace(**vectors, done_B=jnp.zeros_like(slots.done_B))


def _in_turn(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each, the median over rounds."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(-1, rounds):  # the first compiles
        for run, times in zip(runs, seconds):
            start = time.perf_counter()
            run()
            if number >= 0:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def _transformers(model: Llama, batch: int, length: int, steps: int, ours: float) -> dict[str, Any]:
    """The same weights in `transformers`' `generate`, from prompts that fill half of the positions.

    They stand beside ours on the device: on GPU, XLA_PYTHON_CLIENT_PREALLOCATE=false leaves them room.
    """
    name = f"tokens_per_second_over_transformers_at_{batch}"
    if not all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
        return {name: "torch and transformers are not installed"}
    import torch

    theirs = hf.to_transformers(model)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    prompt = torch.randint(tokenizer.SPECIALS, model.config.vocab_size, (batch, length // 2), device=device)

    def write(count: int) -> float:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True}
        start = time.perf_counter()
        with torch.no_grad():
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return time.perf_counter() - start

    try:
        theirs = theirs.to(device).eval()
        write(2)
        # Less the prompt, which the first token waits for.
        seconds = write(steps + 1) - write(1)
    except torch.OutOfMemoryError:
        return {name: "transformers does not fit on the device"}
    return {name: ours * seconds / (batch * steps)}
