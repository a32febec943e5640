"""Causal attention over a whole sequence, and attention of one new token to a cache. One signature, several kernels.

Queries are BNTH, keys and values BKTH with N = K x G (grouped-query attention). Softmax is in float32.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from jpeglm_jax import sharding
from jpeglm_jax.config import ModelConfig


SAVED = "attention"
"""Under this name `jax.checkpoint` policies find what a kernel's backward pass needs of its forward pass."""


def causal(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, kernel: str) -> Array:
    """Each query sees the keys up to its own time; returns BNTH.

    Args:
      kernel: a name in `KERNELS`, or "auto".

    Raises:
      ValueError: there is no such kernel.
    """
    return KERNELS[choose(kernel, q_BNTH.dtype)](q_BNTH, k_BKTH, v_BKTH)


def choose(kernel: str, dtype: str) -> str:
    """The kernel that a name means on this platform: "auto" takes splash on TPU and cuDNN's, which knows no float32, on GPU.

    Raises:
      ValueError: there is no such kernel.
    """
    if kernel == "auto":
        if jax.default_backend() == "tpu":
            return "splash"
        return "cudnn" if jax.default_backend() == "gpu" and dtype == jnp.bfloat16 else "reference"
    if kernel not in KERNELS:
        raise ValueError(f"no attention kernel {kernel!r}; there are: auto, {', '.join(KERNELS)}")
    return kernel


def _reference(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array) -> Array:
    """Plain einsums, with the T x T scores in memory."""
    B, N, T, H = q_BNTH.shape
    K = k_BKTH.shape[1]
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H) * H**-0.5
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKTH, preferred_element_type=jnp.float32)
    visible_TS = jnp.tril(jnp.ones((T, T), bool))
    scores_BKGTS = jnp.where(visible_TS[None, None, None], scores_BKGTS, -jnp.inf)
    # Softmax, divided by its sum only after the product with the values.
    weights_BKGTS = jnp.exp(scores_BKGTS - jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True)))
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS.astype(v_BKTH.dtype), v_BKTH)
    out_BKGTH = (out_BKGTH / weights_BKGTS.sum(-1, keepdims=True)).astype(v_BKTH.dtype)
    return checkpoint_name(out_BKGTH.reshape(B, N, T, H), SAVED)


def _splash(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, interpret: bool = False) -> Array:
    """Splash attention, the Pallas kernel for TPU: blocks of the scores in VMEM, those above the diagonal skipped.

    Args:
      interpret: run it elsewhere, slowly.
    """
    T, H = q_BNTH.shape[2:]
    block = next((block for block in SPLASH_BLOCKS if T % block == 0), None)
    if block is None:
        raise ValueError(f"splash attention needs a multiple of {SPLASH_BLOCKS[-1]} tokens in a row, not {T}; set data.sequence_length")
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def local(q_BNTH, k_BKTH, v_BKTH):
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * q_BNTH.shape[1])
        kernel = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret
        )
        return jax.vmap(kernel)(q_BNTH * H**-0.5, k_BKTH, v_BKTH)

    return _by_device(local)(q_BNTH, k_BKTH, v_BKTH)


def _cudnn(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array) -> Array:
    """cuDNN's flash attention."""

    def local(*qkv):
        q_BTNH, k_BTKH, v_BTKH = (x.swapaxes(1, 2) for x in qkv)
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn").swapaxes(1, 2)

    return checkpoint_name(_by_device(local)(q_BNTH, k_BKTH, v_BKTH), SAVED)


def _by_device(local: Callable) -> Callable:
    """On each device's own examples and heads: the compiler cannot split a kernel that it did not write."""
    spec = sharding.BNTH
    return jax.shard_map(local, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)


KERNELS: dict[str, Callable[[Array, Array, Array], Array]] = {"reference": _reference, "splash": _splash, "cudnn": _cudnn}


SPLASH_BLOCKS = (1024, 512, 256, 128)


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
