"""Cross-entropy of the next token, summed so that parts of a batch add up, and what people read from it."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jpeglm_jax import sharding
from jpeglm_jax.tokenizer import PAD

Batch = dict[str, Array]
"""`inputs` and `targets`, int32 (B, T): the target of a position is the token after its input; PAD targets count nothing."""

Sums = dict[str, Array]
"""Float32 scalars by the names in `TOTALS`: `nll` in nats, `tokens`, and `symbols`, the codec symbols (bytes) that the targets spell."""


TOTALS = ("nll", "tokens", "symbols")


def sums(logits_BTV: Array, targets_BT: Array, lengths_V: Array) -> tuple[Sums, Array]:
    """Sums over the batch, and the sum of squared log-partitions (the z-loss of Wortsman et al. 2023).

    Args:
      lengths_V: the number of symbols that each token spells.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    counts_BT = (targets_BT != PAD).astype(jnp.float32)
    # A product with one-hot rows has a product as its gradient; that of a gather is a scatter.
    one_hot_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=logits_BTV.dtype)
    nll_BT = log_z_BT - jnp.sum(one_hot_BTV * logits_BTV, axis=-1)
    symbols_BT = jnp.asarray(lengths_V, jnp.float32).at[targets_BT].get(out_sharding=sharding.BT)
    totals = {
        "nll": jnp.sum(nll_BT * counts_BT),
        "tokens": jnp.sum(counts_BT),
        "symbols": jnp.sum(symbols_BT * counts_BT),
    }
    return totals, jnp.sum(log_z_BT**2 * counts_BT)


def summary(totals: dict[str, float]) -> dict[str, float]:
    """Of fetched sums: `loss` in nats a token, and `bits_per_byte` of the files (of a symbol, for other alphabets)."""
    nll, tokens, symbols = (float(totals[name]) for name in ("nll", "tokens", "symbols"))
    return {"loss": nll / max(tokens, 1.0), "bits_per_byte": nll / max(symbols, 1.0) / math.log(2)}
