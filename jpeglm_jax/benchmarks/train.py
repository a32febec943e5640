"""Time of a training step, beside that of its matrix products alone and the peak of the device."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.compilation_cache import compilation_cache

from jpeglm_jax import attention, codecs, metrics, sharding, tokenizer
from jpeglm_jax.config import Config, MeshConfig, ModelConfig
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.evaluation import likelihood
from jpeglm_jax.train import make_state, make_step


def bench_train(config: Config, rounds: int) -> dict[str, Any]:
    """Takes real steps on random tokens, and does their matrix products as bare jitted functions, in turn.

    Everything is on the first device, with the whole batch of the config. The products are those of every weight
    matrix, forward and both backward, and those of the scores and values of attention over the full square; what remat
    repeats is not among them, nor is the embedding, which looks rows up. FLOPs are `metrics.train_flops`, which counts
    causal attention as half the square.

    Args:
      rounds: of one step and one pass over the products; times are medians.

    Raises:
      ValueError: the step does not fit on the device, or the config cannot work.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, not {rounds}")
    spell = tokenizer.load(config.tokenizer, codecs.make(config.codec).alphabet_size)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or spell.vocab_size)
    config = dataclasses.replace(config, model=model)
    device = jax.devices()[0]
    rows, length = config.data.batch_size, config.data.sequence_length or Data(config).config.sequence_length
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), [device])
    with jax.set_mesh(mesh), _clear_when_full(device, rows, length):
        tokens = np.random.default_rng(0).integers(tokenizer.SPECIALS, model.vocab_size, (2, rows, length), np.int32)
        batch = likelihood.place({"inputs": tokens[0], "targets": tokens[1]})
        state = jax.block_until_ready(jax.jit(lambda: make_state(config))())
        step = jax.jit(make_step(config, spell.lengths), donate_argnums=0).lower(state, batch)
        with _no_compilation_cache():
            start = time.perf_counter()
            step = step.compile()
            compile_seconds = time.perf_counter() - start
        state, _ = jax.block_until_ready(step(state, batch))
        memory = device.memory_stats()

        products = _products(config, length)
        for run, _ in products:  # compiles
            jax.block_until_ready(run())
        step_times, product_times = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            middle = time.perf_counter()
            for run, count in products:
                for _ in range(count):
                    done = run()
                jax.block_until_ready(done)
            step_times.append(middle - start)
            product_times.append(time.perf_counter() - middle)
    seconds, product_seconds = statistics.median(step_times), statistics.median(product_times)
    flops, peak = metrics.train_flops(model, rows * length, length), metrics.peak_flops(device)
    return {
        "device": device.device_kind,
        "step_ms": 1e3 * seconds,
        "products_ms": 1e3 * product_seconds,
        "step_over_products": seconds / product_seconds,
        "attention_products": "left out: the kernel never makes the scores" if _flash(model) else "the full square",
        "tokens_per_second": rows * length / seconds,
        "gflop_a_step": flops / 1e9,
        "gflop_per_second": flops / seconds / 1e9,
        "mfu": peak and flops / seconds / peak,
        "compile_seconds": compile_seconds,
        "peak_memory_gib": memory and memory["peak_bytes_in_use"] / 2**30,
    }


def _products(config: Config, T: int) -> list[tuple[Callable[[], Any], int]]:
    """Functions that do one product each, forward or backward, and how often a step does it."""
    model = config.model
    parts = sharding.batch_parts(config.data.batch_size, config.optim.rows_per_device, jax.sharding.get_mesh())
    rows = config.data.batch_size // parts
    D, F, N, K, H = model.width, model.mlp_width, model.heads, model.kv_heads, model.head_dim
    shapes = {  # (equation, operands): times in a layer
        ("mk,kn->mn", (rows * T, D), (D, N * H)): 1,
        ("mk,kn->mn", (rows * T, D), (D, K * H)): 2,
        ("mk,kn->mn", (rows * T, N * H), (N * H, D)): 1,
        ("mk,kn->mn", (rows * T, D), (D, F)): 2,
        ("mk,kn->mn", (rows * T, F), (F, D)): 1,
    }
    if not _flash(model):
        queries, keys = (rows * K, N // K * T, H), (rows * K, T, H)
        shapes[("bth,bsh->bts", queries, keys)] = 1
        shapes[("bts,bsh->bth", (*queries[:2], T), keys)] = 1
    counted = [(*shape, count * model.layers * parts) for shape, count in shapes.items()]
    counted.append(("mk,kn->mn", (rows * T, D), (D, model.vocab_size), parts))
    # Operands are cut from one array: random, as zeros and ones take less power on a GPU, but drawn only once.
    largest = max(math.prod(shape) for case in counted for shape in case[1:3])
    numbers = jax.random.normal(jax.random.key(0), largest, model.dtype)
    return [(run, count) for *case, count in counted for run in _forward_and_backward(numbers, *case)]


def _forward_and_backward(numbers: Array, equation: str, left: tuple[int, ...], right: tuple[int, ...]):
    def product(a, b):
        return jnp.einsum(equation, a, b)

    def gradients(a, b, cotangent):
        return jax.vjp(product, a, b)[1](cotangent)

    a, b = (numbers[: math.prod(shape)].reshape(shape) for shape in (left, right))
    forward, backward = jax.jit(product), jax.jit(gradients)
    cotangent = forward(a, b)
    return (lambda: forward(a, b)), (lambda: backward(a, b, cotangent))


def _flash(model: ModelConfig) -> bool:
    """Whether attention is done without the T x T scores."""
    return attention.choose(model.attention, model.dtype) == "cudnn"


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Has programs compiled, not read from the cache that the command keeps."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it uses the cache, until this
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _clear_when_full(device: jax.Device, rows: int, length: int) -> Iterator[None]:
    """Says what to do when memory is short.

    Raises:
      ValueError: in place of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"a step of {rows} rows of {length} tokens does not fit on {device.device_kind}: lower data.batch_size, "
            "lower optim.rows_per_device, set model.remat to full, or take a smaller model"
        ) from error
