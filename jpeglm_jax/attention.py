"""Causal attention over a whole sequence, and attention of one new token to a cache. One signature, several kernels.

Queries are BTNH, keys and values BTKH with N = K x G (grouped-query attention). Softmax is in float32.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jpeglm_jax import sharding
from jpeglm_jax.config import ModelConfig


def causal(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, kernel: str) -> Array:
    """Each query sees the keys up to its own time; returns BTNH.

    Args:
      kernel: a name in `KERNELS`, or "auto".

    Raises:
      ValueError: there is no such kernel.
    """
    return KERNELS[choose(kernel, q_BTNH.dtype)](q_BTNH, k_BTKH, v_BTKH)


def choose(kernel: str, dtype: str) -> str:
    """The kernel that a name means on this platform: "auto" takes cuDNN's on GPU, which knows no float32.

    Raises:
      ValueError: there is no such kernel.
    """
    if kernel == "auto":
        return "cudnn" if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 else "reference"
    if kernel not in KERNELS:
        raise ValueError(f"no attention kernel {kernel!r}; there are: auto, {', '.join(KERNELS)}")
    return kernel


def _reference(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
    """Plain einsums, with the T x T scores in memory."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Heads before time: the batch dims of both products lead, which spares copies on CPU.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    k_BKSH, v_BKSH = (a.transpose(0, 2, 1, 3) for a in (k_BTKH, v_BTKH))
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    visible_TS = jnp.tril(jnp.ones((T, T), bool))
    scores_BKGTS = jnp.where(visible_TS[None, None, None], scores_BKGTS, -jnp.inf)
    # Softmax, divided by its sum only after the product with the values.
    weights_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True)))
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    out_BKGTH = (out_BKGTH / weights_BKGTS.sum(-1, keepdims=True)).astype(v_BKSH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _cudnn(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
    """cuDNN's flash attention, on each device's own examples and heads."""

    def local(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    spec = sharding.BTNH
    return jax.shard_map(local, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q_BTNH, k_BTKH, v_BTKH)


KERNELS: dict[str, Callable[[Array, Array, Array], Array]] = {"reference": _reference, "cudnn": _cudnn}


class Cache(NamedTuple):
    """Keys (after rotation) and values of the tokens seen so far; slot s holds position s."""

    k_LBKSH: Array
    v_LBKSH: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int) -> "Cache":
        """Of `length` positions."""
        shape = (config.layers, batch, config.kv_heads, length, config.head_dim)
        return cls(*(jnp.zeros(shape, config.dtype, out_sharding=sharding.LBKSH) for _ in cls._fields))


def put(cache: Cache, rows: Cache, index_R: Array) -> Cache:
    """Puts the beginnings of examples in place of those at `index_R`; an index beyond the last drops its example.

    Inside `jax.shard_map`: the indices count the examples of the device.
    """
    B = cache.k_LBKSH.shape[1]
    for row in range(len(index_R)):
        def write(old_LBKSH, new_LRKTH):
            new_L1KTH = new_LRKTH[:, row : row + 1, :, : old_LBKSH.shape[3]]
            place = (0, jnp.minimum(index_R[row], B - 1), 0, 0, 0)
            kept = jax.lax.dynamic_slice(old_LBKSH, place, new_L1KTH.shape)
            return jax.lax.dynamic_update_slice(old_LBKSH, jnp.where(index_R[row] < B, new_L1KTH, kept), place)

        cache = jax.tree.map(write, cache, rows)
    return cache


def cached(
    q_BNH: Array, k_BKH: Array, v_BKH: Array, position_B: Array, cache: Cache, layer: Array
) -> tuple[Array, Cache]:
    """Puts one new key and value for each example into the cache; its query sees the slots up to it.

    Returns the attended values, BNH, and the cache.
    """
    B, BNH, cache_spec = P(sharding.BATCH), sharding.BNH, Cache(sharding.LBKSH, sharding.LBKSH)
    # Each example writes at a position of its own: a local scatter on every device.
    local = jax.shard_map(
        _update_and_attend, in_specs=(BNH, BNH, BNH, B, cache_spec, P()), out_specs=(BNH, cache_spec), check_vma=False
    )
    return local(q_BNH, k_BKH, v_BKH, position_B, cache, layer)


def _update_and_attend(q_BNH, k_BKH, v_BKH, position_B, cache, layer):
    B, N, H = q_BNH.shape
    K, S = cache.k_LBKSH.shape[2:4]
    # A scatter with an index for each head: one of all heads of a position at once makes the TPU's compiler prefer a
    # cache with time before heads, into which it then copies all of it, and back.
    place = (layer, jnp.arange(B)[:, None], jnp.arange(K)[None], position_B[:, None])
    new = ((cache.k_LBKSH, k_BKH), (cache.v_LBKSH, v_BKH))
    cache = Cache(*(old.at[place].set(token) for old, token in new))
    k_BKSH, v_BKSH = cache.k_LBKSH[layer], cache.v_LBKSH[layer]
    q_BKGH = q_BNH.reshape(B, K, N // K, H) * H**-0.5
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    visible_BS = jnp.arange(S)[None] <= position_B[:, None]
    weights_BKGS = jax.nn.softmax(jnp.where(visible_BS[:, None, None], scores_BKGS, -jnp.inf)).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, v_BKSH).reshape(B, N, H), cache
