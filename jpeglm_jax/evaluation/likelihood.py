"""Bits that a model, or a reference, needs for a byte of held-out pictures."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jpeglm_jax import loss, sharding
from jpeglm_jax.data.packing import Batches
from jpeglm_jax.loss import Batch
from jpeglm_jax.model import Llama

Evaluate = Callable[[Llama, Batches, int | None], dict[str, float]]


def make_evaluate(lengths_V: np.ndarray) -> Evaluate:
    """A function of model, batches and how many of them at most (None: all), to `loss.summary` of them."""

    @jax.jit
    def sums(model: Llama, batch: Batch) -> loss.Sums:
        return loss.sums(model(batch["inputs"]), batch["targets"], lengths_V)[0]

    def evaluate(model: Llama, batches: Batches, limit: int | None) -> dict[str, float]:
        totals = [sums(model, place(batches[number])) for number in range(min(limit or len(batches), len(batches)))]
        summed = jax.device_get(jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts)), *totals))
        if not summed["tokens"]:
            raise ValueError("none of the held-out pictures can be read; the log says why for each")
        return loss.summary(summed)

    return evaluate


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
