"""The decoding loop, wholly on the device: prefill, then one token after another until every sequence has ended."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeglm_jax import sharding
from jpeglm_jax.model import Llama
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import EOS, PAD

PROMPT_MULTIPLE = 64
"""Prompts are padded to a multiple of this, so that a few compilations serve all lengths."""


def generate(
    model: Llama, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampler: Sampler, max_tokens: int
) -> list[np.ndarray]:
    """Continues each prompt until EOS or `max_tokens` in all, inside `jax.set_mesh` of the model's mesh.

    Args:
      prompts: token ids, int32 (length,) each, BOS first; lengths may differ.
      seeds: of each prompt. A sequence depends on its prompt and seed, not on what it is batched with.

    Returns:
      Token ids of each prompt and its continuation, int32 (length,) each, up to and with EOS.

    Raises:
      ValueError: a prompt that leaves no room in `max_tokens`.
    """
    longest = max(map(len, prompts))
    if longest >= max_tokens:
        raise ValueError(f"a prompt has {longest} tokens and max_tokens is {max_tokens}: nothing is left to write")
    mesh = jax.sharding.get_mesh()
    multiple = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-len(prompts) // multiple) * multiple  # the first prompt fills up the batch
    width = min(-(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, max_tokens)
    tokens_BT = np.full((rows, width), PAD, np.int32)
    for row in range(rows):
        prompt = prompts[row if row < len(prompts) else 0]
        tokens_BT[row, : len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in prompts] + [len(prompts[0])] * (rows - len(prompts)), np.int32)
    seed_B = np.array([*seeds] + [0] * (rows - len(prompts)), np.uint32)

    by_row = NamedSharding(mesh, P(sharding.BATCH))
    written_BS, end_B = jax.device_get(
        _generate(
            model,
            jax.device_put(tokens_BT, NamedSharding(mesh, sharding.BT)),
            jax.device_put(length_B, by_row),
            jax.device_put(seed_B, by_row),
            sampler,
            max_tokens,
        )
    )
    return [written_S[:end] for written_S, end in zip(written_BS, end_B)][: len(prompts)]


@functools.partial(jax.jit, static_argnames=("sampler", "slots"))
def _generate(
    model: Llama, tokens_BT: Array, length_B: Array, seed_B: Array, sampler: Sampler, slots: int
) -> tuple[Array, Array]:
    """Tokens, int32 (B, slots), and the length of each sequence, int32 (B,)."""

    def choose(logits_BV: Array, position_B: Array) -> Array:
        # A key for each seed and position: independent of the batch and of where the prompt ended.
        keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed_B, position_B)
        return jax.vmap(sampler)(logits_BV, keys_B)

    def step(state):
        written_BS, token_B, position_B, done_B, cache = state
        here_BS = (jnp.arange(slots)[None] == position_B[:, None]) & ~done_B[:, None]
        written_BS = jnp.where(here_BS, token_B[:, None], written_BS)
        done_B |= (token_B == EOS) | (position_B == slots - 1)
        logits_BV, cache = model.decode(token_B, position_B, cache)
        position_B = jnp.where(done_B, position_B, position_B + 1)
        return written_BS, choose(logits_BV, position_B), position_B, done_B, cache

    # The cache is made in here: one that is passed in and donated costs a second copy on TPU.
    logits_BV, cache = model.prefill(tokens_BT, length_B, slots)
    written_BS = jnp.pad(tokens_BT, ((0, 0), (0, slots - tokens_BT.shape[1])))
    state = (written_BS, choose(logits_BV, length_B), length_B, jnp.zeros_like(length_B, bool), cache)
    written_BS, _, position_B, _, _ = jax.lax.while_loop(lambda state: ~jnp.all(state[3]), step, state)
    return written_BS, position_B + 1
