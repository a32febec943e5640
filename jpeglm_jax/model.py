"""Llama-2 (Touvron et al. 2023): RMSNorm, rotary positions, attention, SwiGLU. Layers are stored stacked and scanned.

Dims in names and einsum strings are those of `sharding.py`. Each weight is declared once: its shape, layout and initial
scale stand on one line, and optimizer state, checkpoints and other formats follow from it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jpeglm_jax import attention, sharding
from jpeglm_jax.attention import Cache
from jpeglm_jax.config import ModelConfig

_saved = jax.checkpoint_policies.save_only_these_names

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _saved(attention.SAVED),
    "residual": _saved(attention.SAVED, "residual"),
    "qkv": _saved(attention.SAVED, "residual", "qkv"),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _saved(attention.SAVED)
    ),
}
"""What `ModelConfig.remat` keeps of a layer for the backward pass, from little to much."""


class Llama(nnx.Module):
    """The decoder: token ids in, logits of the next token out.

    Make it inside `jax.set_mesh(mesh)`; every weight is created where it belongs.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.vocab_size, "vocab_size is filled in from the tokenizer before the model is made"
        V, D = config.vocab_size, config.width
        self.config = config
        self.embed_VD = matrix(rngs, (V, D), sharding.VD, D**-0.5)
        # None: the stacked layer dim is not split over the mesh.
        stack = nnx.vmap(lambda rngs: Block(config, rngs), transform_metadata={nnx.PARTITION_NAME: None})
        self.blocks = stack(rngs.split(config.layers))
        self.norm = RMSNorm(D, config)
        self.head_DV = None if config.tied else matrix(rngs, (D, V), sharding.DV, D**-0.5)

    def __call__(self, tokens_BT: Array) -> Array:
        """Logits of each next token, float32 (B, T, V)."""
        rotation = rotary(jnp.arange(tokens_BT.shape[1])[None], self.config)

        def layer(x_BTD, block):
            return block(x_BTD, rotation)[0], None

        if self.config.remat != "none":
            # prevent_cse only matters outside of scan.
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        x_BTD, _ = jax.lax.scan(layer, self.embed(tokens_BT), self.blocks)
        return self.logits(x_BTD)

    def prefill(self, tokens_BT: Array, length_B: Array) -> tuple[Array, Cache]:
        """Reads prompts of `length_B` tokens (the rest of each row is ignored).

        Returns the logits after each prompt's last token, (B, V), and a cache of T positions.
        """
        rotation = rotary(jnp.arange(tokens_BT.shape[1])[None], self.config)
        x_BTD, kv_LBKTH = jax.lax.scan(
            lambda x_BTD, block: block(x_BTD, rotation), self.embed(tokens_BT), self.blocks
        )
        # What the cache holds beyond a prompt's end is overwritten before any query sees it.
        last_BD = jax.vmap(lambda x_TD, length: x_TD[length - 1])(x_BTD, length_B)
        return self.logits(last_BD[:, None])[:, 0], Cache(*kv_LBKTH)

    def decode(self, token_B: Array, position_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads one token for each example, at its position; returns logits (B, V) and the cache with it."""
        rotation = rotary(position_B[:, None], self.config)

        def layer(carry, block_and_index):
            return block_and_index[0].decode(*carry, rotation, position_B, block_and_index[1]), None

        # The cache is carried, not scanned over, so that it is updated in place.
        layers = (self.blocks, jnp.arange(self.config.layers))
        (x_B1D, cache), _ = jax.lax.scan(layer, (self.embed(token_B[:, None]), cache), layers)
        return self.logits(x_B1D)[:, 0], cache

    def embed(self, tokens_BT: Array) -> Array:
        # A product with one-hot rows: for a vocabulary this small it is faster than a gather, whose gradient is a scatter.
        dtype = self.config.dtype
        one_hot_BTV = jax.nn.one_hot(tokens_BT, self.embed_VD.shape[0], dtype=dtype)
        return jnp.einsum("BTV,VD->BTD", one_hot_BTV, self.embed_VD[...].astype(dtype), out_sharding=sharding.BTD)

    def logits(self, x_BTD: Array) -> Array:
        head_DV = self.embed_VD[...].T if self.head_DV is None else self.head_DV[...]
        x_BTD = self.norm(x_BTD)
        return jnp.einsum(
            "BTD,DV->BTV",
            x_BTD,
            head_DV.astype(x_BTD.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=sharding.BTV,
        )


class Block(nnx.Module):
    """One layer: attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BTD: Array, rotation: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        attended_BTD, kv = self.attention(self.attention_norm(x_BTD), rotation)
        x_BTD = checkpoint_name(x_BTD + attended_BTD, "residual")
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kv

    def decode(
        self, x_B1D: Array, cache: Cache, rotation: tuple[Array, Array], position_B: Array, layer: Array
    ) -> tuple[Array, Cache]:
        attended_B1D, cache = self.attention.decode(self.attention_norm(x_B1D), cache, rotation, position_B, layer)
        x_B1D += attended_B1D
        return x_B1D + self.mlp(self.mlp_norm(x_B1D)), cache


class Attention(nnx.Module):
    """Multi-head or grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, N, K, H = config.width, config.heads, config.kv_heads, config.head_dim
        self.kernel = config.attention
        self.q_DNH = matrix(rngs, (D, N, H), sharding.DNH, D**-0.5)
        self.k_DKH = matrix(rngs, (D, K, H), sharding.DNH, D**-0.5)
        self.v_DKH = matrix(rngs, (D, K, H), sharding.DNH, D**-0.5)
        self.o_NHD = matrix(rngs, (N, H, D), sharding.NHD, (N * H * 2 * config.layers) ** -0.5)
        self.q_norm = RMSNorm(H, config) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config) if config.qk_norm else None

    def __call__(self, x_BTD: Array, rotation: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        q_BNTH, k_BKTH, v_BKTH = checkpoint_name(self.project(x_BTD, rotation), "qkv")
        out_BNTH = attention.causal(q_BNTH, k_BKTH, v_BKTH, self.kernel)
        return self.output(out_BNTH), (k_BKTH, v_BKTH)

    def decode(
        self, x_B1D: Array, cache: Cache, rotation: tuple[Array, Array], position_B: Array, layer: Array
    ) -> tuple[Array, Cache]:
        q_BN1H, k_BK1H, v_BK1H = self.project(x_B1D, rotation)
        out_BNH, cache = attention.cached(q_BN1H[:, :, 0], k_BK1H[:, :, 0], v_BK1H[:, :, 0], position_B, cache, layer)
        return self.output(out_BNH[:, :, None]), cache

    def project(self, x_BTD: Array, rotation: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        def heads(weight):
            return jnp.einsum("BTD,DNH->BNTH", x_BTD, sharding.gather(weight[...], x_BTD.dtype), out_sharding=sharding.BNTH)

        q_BNTH, k_BKTH, v_BKTH = heads(self.q_DNH), heads(self.k_DKH), heads(self.v_DKH)
        if self.q_norm is not None:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        return rotate(q_BNTH, rotation), rotate(k_BKTH, rotation), v_BKTH

    def output(self, out_BNTH: Array) -> Array:
        o_NHD = sharding.gather(self.o_NHD[...], out_BNTH.dtype)
        return jnp.einsum("BNTH,NHD->BTD", out_BNTH, o_NHD, out_sharding=sharding.BTD)


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        self.gate_DF = matrix(rngs, (D, F), sharding.DF, D**-0.5)
        self.up_DF = matrix(rngs, (D, F), sharding.DF, D**-0.5)
        self.down_FD = matrix(rngs, (F, D), sharding.FD, (F * 2 * config.layers) ** -0.5)

    def __call__(self, x_BTD: Array) -> Array:
        project = functools.partial(jnp.einsum, "BTD,DF->BTF", x_BTD, out_sharding=sharding.BTF)
        gate_BTF = project(sharding.gather(self.gate_DF[...], x_BTD.dtype))
        up_BTF = project(sharding.gather(self.up_DF[...], x_BTD.dtype))
        down_FD = sharding.gather(self.down_FD[...], x_BTD.dtype)
        return jnp.einsum("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), down_FD, out_sharding=sharding.BTD)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """The gated activation; its gradients are made at once, in the place of its arguments."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(gate_and_up: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    _, backward = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *gate_and_up)
    return jax.lax.optimization_barrier(backward(cotangent))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class RMSNorm(nnx.Module):
    """Scales the last dim to unit mean square, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse * scale).astype(x.dtype)


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, std: float) -> nnx.Param:
    """A float32 weight, normal within two standard deviations, created on its shards."""
    return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2, 2, shape, out_sharding=spec))


def rotary(position_BT: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Cosine and sine of the rotation angles (Su et al. 2021), float32 (B, 1, T, H)."""
    frequency_H = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2) / config.head_dim)
    angle_B1TH = position_BT[:, None, :, None] * jnp.tile(frequency_H, 2)[None, None, None]
    return jnp.cos(angle_B1TH), jnp.sin(angle_B1TH)


def rotate(x_BNTH: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the pairs (h, h + H/2), the half-split layout of Hugging Face."""
    cos, sin = rotation
    H = x_BNTH.shape[-1]
    # Partner of each entry: (-b, a) of (a, b). As a product with ones and zeros, which the TPU's matrix unit does in
    # passing; halves cut out and put together again are copies there.
    partner_HH = jnp.roll(jnp.diag(jnp.where(jnp.arange(H) < H // 2, 1, -1)), H // 2, axis=1).astype(x_BNTH.dtype)
    partner_BNTH = jnp.einsum("BNTH,HJ->BNTJ", x_BNTH, partner_HH, out_sharding=sharding.BNTH)
    return (x_BNTH * cos + partner_BNTH * sin).astype(x_BNTH.dtype)


def in_dtype(model: Llama) -> Llama:
    """The model with its matrices in the type that every product casts them to: half of the memory to read a step.

    The norms stay in float32, in which they are used.
    """

    def cast(path, weight):
        return weight if "scale" in jax.tree_util.keystr(path) else weight.astype(model.config.dtype)

    return jax.tree.map_with_path(cast, model)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, without making any."""
    abstract = jax.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))
