"""Bits that a model, or a reference, needs for a byte of held-out pictures."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeglm_jax import loss, sharding
from jpeglm_jax.data.packing import Batches
from jpeglm_jax.grammar.tokens import Tables, advance, allowed
from jpeglm_jax.loss import Batch
from jpeglm_jax.model import Llama
from jpeglm_jax.tokenizer import BOS, EOS

PLENTY = 2**29
"""A budget that closes no token."""

Evaluate = Callable[[Llama, Batches, int | None], dict[str, float]]


def make_evaluate(lengths_V: np.ndarray, tables: Tables) -> Evaluate:
    """A function of model, batches and how many of them at most (None: all), to `summary` of them.

    Args:
      lengths_V: the number of symbols that each token spells.
      tables: of the grammar over the same tokens.
    """

    @jax.jit
    def sums(model: Llama, batch: Batch, tables: Tables) -> loss.Sums:
        logits_BTV = model(batch["inputs"])
        totals, _ = loss.sums(logits_BTV, batch["targets"], lengths_V)
        return totals | _grammar_sums(logits_BTV, batch, jnp.asarray(lengths_V), tables)

    def evaluate(model: Llama, batches: Batches, limit: int | None) -> dict[str, float]:
        known = jax.device_put(tables, NamedSharding(jax.sharding.get_mesh(), sharding.REPLICATED))
        numbers = range(min(limit or len(batches), len(batches)))
        totals = [sums(model, place(batches[number]), known) for number in numbers]
        summed = jax.device_get(jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts)), *totals))
        if not summed["tokens"]:
            raise ValueError("none of the held-out pictures can be read; the log says why for each")
        return summary(summed)

    return evaluate


def summary(totals: dict[str, float]) -> dict[str, float]:
    """Of fetched sums: what `loss.summary` gives and, where the grammar's state is known,

    `impossible_mass`, the probability on tokens that cannot come next, mean over positions; and
    `bits_per_byte_masked`, less than `bits_per_byte` by what a byte saves when the possible tokens share that mass.
    """
    values = loss.summary(totals)
    if totals["known_symbols"]:
        values["impossible_mass"] = float(totals["impossible"] / totals["known"])
        saved = float(totals["saved"] / totals["known_symbols"]) / math.log(2)
        values["bits_per_byte_masked"] = values["bits_per_byte"] - saved
    return values


def _grammar_sums(logits_BTV: Array, batch: Batch, lengths_V: Array, tables: Tables) -> loss.Sums:
    """Float32 sums over the positions where the grammar says what may come: `known`, how many there are;
    `known_symbols`, that their targets spell; `impossible`, probability; `saved`, nats by taking it away.

    A row that begins inside a picture is unknown up to the first BOS. What follows EOS, and a dummy prefix, are not the
    grammar's.
    """

    def local(logits_BTV, inputs_BT, targets_BT, lengths_V, tables):
        state_BT, left_BT = jax.vmap(_places, (0, None, None))(inputs_BT, lengths_V, tables)

        def row(parts) -> loss.Sums:
            logits_TV, targets_T, state_T, left_T = parts
            mask_TV = jax.vmap(allowed, (None, 0, 0, None))(tables, state_T, left_T, PLENTY)
            masked_TV = jnp.where(mask_TV, logits_TV, -jnp.inf)
            saved_T = jax.nn.logsumexp(logits_TV, axis=-1) - jax.nn.logsumexp(masked_TV, axis=-1)
            symbols_T = lengths_V[targets_T]
            known_T = (state_T > 0) & (state_T != tables.end) & ((symbols_T > 0) | (targets_T == EOS))
            values = {
                "known": jnp.ones_like(saved_T),
                "known_symbols": symbols_T.astype(jnp.float32),
                "impossible": -jnp.expm1(-saved_T),
                "saved": saved_T,
            }
            return {name: jnp.sum(jnp.where(known_T, value_T, 0)) for name, value_T in values.items()}

        # The masks of one row at a time: those of all of them are as large as the logits.
        return jax.lax.map(row, (logits_BTV, targets_BT, state_BT, left_BT))

    by_row = jax.shard_map(
        local,
        in_specs=(sharding.BTV, sharding.BT, sharding.BT, P(), P()),
        out_specs=P(sharding.BATCH),
        check_vma=False,
    )
    return jax.tree.map(jnp.sum, by_row(logits_BTV, batch["inputs"], batch["targets"], lengths_V, tables))


def _places(inputs_T: Array, lengths_V: Array, tables: Tables) -> tuple[Array, Array]:
    """The grammar's state after each token, and MCUs left, int32 (T,) each; state 0 where it is not known."""

    def read(place, token):
        changes = (lengths_V[token] > 0) | (token == EOS)
        state, left = (jnp.where(changes, new, old) for new, old in zip(advance(tables, *place, token), place))
        place = jnp.where(token == BOS, tables.start, state), jnp.where(token == BOS, tables.mcus, left)
        return place, place

    return jax.lax.scan(read, (jnp.int32(0), jnp.int32(0)), inputs_T)[1]


def place(element: dict[str, np.ndarray]) -> Batch:
    """This host's rows of a batch to its devices, inside `jax.set_mesh`."""
    layout = NamedSharding(jax.sharding.get_mesh(), sharding.BT)
    return {name: jax.make_array_from_process_local_data(layout, element[name]) for name in ("inputs", "targets")}


def order_0(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], alphabet_size: int) -> float:
    """Bits a symbol of held-out streams under the frequencies of the training streams, each count one higher.

    What a model reaches that knows how often each byte comes, but nothing of its place.
    """
    counts, seen = (
        sum((np.bincount(stream, minlength=alphabet_size) for stream in streams), np.zeros(alphabet_size, np.int64))
        for streams in (train, held_out)
    )
    bits = -np.log2((counts + 1) / (counts + 1).sum())
    return float((seen * bits).sum() / seen.sum())
