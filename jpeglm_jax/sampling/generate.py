"""The decoding loop: slots that write pictures side by side, chunks of steps on the device, and refill between them.

A slot is a row of the batch and of the cache. When enough pictures have ended, the chunk ends; the next prompts are
read in a small batch of their own and put in the places of those that ended. A token depends on its prompt, its seed
and its position alone, so it does not matter in which slot, and beside which others, a picture is written.

The cache is donated from call to call and never copied. On TPU that takes care: a carry of a loop is updated in place,
but where the loop prefers another layout than the one that arrays have between calls, the whole cache is copied on the
way in and out. `attention.cached` writes such that it does not. Compiled for the 7B in bfloat16, batch 8 of 12,288
positions, on v5e:2x4 with heads over the tensor axis (libtpu 0.0.42.1), GiB a chip: cache 6.00, temporary memory of a
chunk 1.06 (weights in the layout that the loop prefers) and of a refill by a prompt of 2,560 tokens 0.20. With one
scatter of all heads of a position, a chunk took 4.07.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeglm_jax import attention, sharding
from jpeglm_jax.attention import Cache
from jpeglm_jax.grammar.tokens import Tables, advance, allowed, reserve, shortest
from jpeglm_jax.model import Llama, in_dtype
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import EOS, PAD

MULTIPLE = 64
"""A cache has a multiple of so many positions, and prompts are padded to this times a power of two: a few compilations
serve all lengths."""

CHUNK = 128
"""Steps on the device between two looks of the host, at most."""

GROUPS = 8
"""A refill reads an eighth of the slots: large enough for the device, and no slot waits long for it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A picture to write."""

    prompt: np.ndarray
    """Token ids, int32 (length,), BOS first."""
    seed: int
    limit: int
    """Tokens of all, prompt included: with a grammar a promise that the picture ends by then, else where it is cut."""
    state: int = 0
    """With a grammar: its state after the prompt,"""
    left: int = 0
    """and the MCUs that are then not complete."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A picture, or as much of it as there is yet."""

    tokens: np.ndarray
    """Prompt and continuation, int32 (length,), up to and with EOS."""
    removed: float
    """Probability that the mask took from impossible tokens, mean of the written ones; 0 without a grammar."""
    done: bool


def generate(
    model: Llama,
    requests: Sequence[Request],
    sampler: Sampler,
    tables: Tables | None,
    slots: int,
    chunk: int = CHUNK,
    look: Callable[[dict[int, Written]], None] | None = None,
) -> list[Written]:
    """All pictures, with a progress bar; `look` gets what `write` yields; arguments and errors as of `write`."""
    written: dict[int, Written] = {}
    with tqdm.tqdm(total=len(requests), desc="writing", unit="picture", leave=False, dynamic_ncols=True) as bar:
        for changed in write(model, requests, sampler, tables, slots, chunk):
            written |= changed
            if look:
                look(changed)
            bar.set_postfix_str(f"{sum(len(picture.tokens) for picture in written.values()):,} tokens", refresh=False)
            bar.update(sum(picture.done for picture in changed.values()))
            bar.refresh()
    return [written[number] for number in range(len(requests))]


def write(
    model: Llama, requests: Sequence[Request], sampler: Sampler, tables: Tables | None, slots: int, chunk: int = CHUNK
) -> Iterator[dict[int, Written]]:
    """Writes pictures inside `jax.set_mesh` of the model's mesh; yields, after each chunk, those that have grown.

    Args:
      tables: of the grammar; None leaves every token possible.
      slots: pictures that are written at the same time; rounded up to a multiple of the batch shards of the mesh.
      chunk: steps between two yields, at most; never more than CHUNK.

    Raises:
      ValueError: a prompt that leaves no room in its limit.
    """
    spare = [_spare(request, tables) for request in requests]
    mesh = jax.sharding.get_mesh()
    shards = sharding.batch_shards(mesh)

    def in_shards(rows: int) -> int:
        return -(-rows // shards) * shards

    count = in_shards(min(slots, len(requests)))
    group = in_shards(-(-count // GROUPS))
    model = in_dtype(model)
    tables = jax.device_put(tables, NamedSharding(mesh, P()))
    longest = max(request.limit for request in requests)
    state = empty_slots(model, count, -(-longest // MULTIPLE) * MULTIPLE)
    waiting, running = list(range(len(requests)))[::-1], {}
    written = [request.prompt for request in requests]
    while waiting or running:
        free = [slot for slot in range(count) if slot not in running]
        while waiting and len(free) >= min(group, len(waiting)):
            entering = {free.pop(0): waiting.pop() for _ in range(min(group, len(waiting)))}
            state = _admit(model, tables, sampler, state, _rows(requests, spare, entering, group, count))
            running |= entering
        enough = min(group, len(waiting)) if waiting else count
        state, report = run_chunk(model, tables, sampler, state, np.int32(enough), np.int32(min(chunk, CHUNK)))
        tokens_BC, removed_B, steps = jax.device_get(report)
        changed = {}
        for slot, number in list(running.items()):
            request = requests[number]
            new = tokens_BC[slot, : min(steps, request.limit - len(written[number]))]
            new = new[: np.argmax(new == EOS) + 1] if (new == EOS).any() else new
            written[number] = np.concatenate([written[number], new])
            done = bool(new[-1] == EOS) or len(written[number]) == request.limit
            mean = float(removed_B[slot]) / (len(written[number]) - len(request.prompt))
            changed[number] = Written(written[number], mean, done)
            if done:
                del running[slot]
        yield changed


def _spare(request: Request, tables: Tables | None) -> int:
    """Tokens that there are beyond the shortest end of the picture."""
    room = request.limit - len(request.prompt)
    least = 1 if tables is None else int(shortest(tables, request.state, request.left))
    if room < least:
        raise ValueError(
            f"a prompt has {len(request.prompt)} tokens, the shortest end of the picture {least}: "
            f"max_tokens must be at least {len(request.prompt) + least}, not {request.limit}"
        )
    return room - least


class Slots(NamedTuple):
    """The pictures on the device. Rows that are done, or were never used, are computed and not looked at."""

    token_B: Array
    """Chosen, but not yet read by the model, int32,"""
    position_B: Array
    """and its position, int32."""
    limit_B: Array
    seed_B: Array
    done_B: Array
    state_B: Array
    left_B: Array
    begin_B: Array
    """MCUs that were left when the row began."""
    spare_B: Array
    """Tokens to be shared among them."""
    removed_B: Array
    """Sum over the written tokens of the mass that the mask removed, float32."""
    cache: Cache

    @classmethod
    def layout(cls, batch: P, cache: P) -> "Slots":
        """A PartitionSpec for each array."""
        return cls(*[batch] * (len(cls._fields) - 1), Cache(cache, cache))


LAYOUT = Slots.layout(P(sharding.BATCH), sharding.LBKSH)
REPLICATED = Slots.layout(P(), sharding.LRKTH)


@functools.partial(jax.jit, static_argnums=(1, 2))
def empty_slots(model: Llama, count: int, length: int) -> Slots:
    """Slots of which none is in use, with a cache of `length` positions."""
    numbers = jnp.zeros(count, jnp.int32, out_sharding=P(sharding.BATCH))
    vectors = dict.fromkeys(Slots._fields[:-1], numbers)
    vectors |= {"seed_B": numbers.astype(jnp.uint32), "done_B": numbers == 0, "removed_B": numbers.astype(jnp.float32)}
    return Slots(**vectors, cache=Cache.empty(model.config, count, length))


def _rows(
    requests: Sequence[Request], spare: Sequence[int], entering: dict[int, int], group: int, count: int
) -> tuple[Array, ...]:
    """Prompts (R, T), length, slot, limit, spare, seed, state and left, (R,) each, of the requests that enter slots.

    What a group lacks is filled up with its first request, in a slot beyond the last.
    """
    chosen = [*entering.values()]
    chosen += chosen[:1] * (group - len(chosen))
    slot_R = np.array([*entering, *[count] * (group - len(entering))], np.int32)
    spare_R = np.array([spare[number] for number in chosen], np.int32)
    picked = [requests[number] for number in chosen]
    seed_R = np.array([request.seed for request in picked], np.uint32)
    rows = [(len(request.prompt), request.limit, request.state, request.left) for request in picked]
    length_R, limit_R, state_R, left_R = np.array(rows, np.int32).T
    width = MULTIPLE
    while width < length_R.max():
        width *= 2
    prompts_RT = np.full((group, width), PAD, np.int32)
    for row, request in zip(prompts_RT, picked):
        row[: len(request.prompt)] = request.prompt
    arrays = (prompts_RT, length_R, slot_R, limit_R, spare_R, seed_R, state_R, left_R)
    return jax.device_put(arrays, NamedSharding(jax.sharding.get_mesh(), P(sharding.BATCH)))


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="slots")
def _admit(model: Llama, tables: Tables | None, sampler: Sampler, slots: Slots, rows: tuple[Array, ...]) -> Slots:
    """Reads prompts and begins their pictures, in the slots that they are for."""
    prompts_RT, length_R, slot_R, limit_R, spare_R, seed_R, state_R, left_R = rows
    logits_RV, cache = model.prefill(prompts_RT, length_R)
    new = Slots(
        token_B=length_R,  # to be chosen
        position_B=length_R - 1,
        limit_B=limit_R,
        seed_B=seed_R,
        done_B=length_R == 0,
        state_B=state_R,
        left_B=left_R,
        begin_B=left_R,
        spare_B=spare_R,
        removed_B=jnp.zeros_like(length_R, jnp.float32),
        cache=cache,
    )
    new = _choose(logits_RV, tables, sampler, new)

    def put(slots: Slots, new: Slots, slot_R: Array) -> Slots:
        B = len(slots.done_B)
        index_R = slot_R - jax.lax.axis_index(sharding.BATCH) * B
        index_R = jnp.where((index_R >= 0) & (index_R < B), index_R, B)  # B: a row of another device, or of none
        vectors = [old_B.at[index_R].set(new_R, mode="drop") for old_B, new_R in zip(slots[:-1], new[:-1])]
        return Slots(*vectors, attention.put(slots.cache, new.cache, index_R))

    new, slot_R = jax.sharding.reshard((new, slot_R), (REPLICATED, P()))
    in_specs = (LAYOUT, REPLICATED, P())
    return jax.shard_map(put, in_specs=in_specs, out_specs=LAYOUT, check_vma=False)(slots, new, slot_R)


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="slots")
def run_chunk(
    model: Llama, tables: Tables | None, sampler: Sampler, slots: Slots, enough: Array, most: Array
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Steps until `enough` slots are done, at most `most`, which is at most CHUNK.

    Returns:
      The slots, and, on every device, the tokens written, int32 (B, CHUNK), of a row only those up to its end, the mass
      removed from each row so far, float32 (B,), and the number of steps.
    """

    def step(state):
        slots, tokens_BC, number = state
        tokens_BC = jnp.where(jnp.arange(CHUNK)[None] == number, slots.token_B[:, None], tokens_BC)
        done_B = slots.done_B | (slots.token_B == EOS) | (slots.position_B == slots.limit_B - 1)
        logits_BV, cache = model.decode(slots.token_B, slots.position_B, slots.cache)
        return _choose(logits_BV, tables, sampler, slots._replace(done_B=done_B, cache=cache)), tokens_BC, number + 1

    def goes_on(state):
        slots, _, number = state
        return (number < most) & (jnp.sum(slots.done_B) < enough)

    tokens_BC = jnp.zeros((len(slots.done_B), CHUNK), jnp.int32, out_sharding=sharding.BT)
    slots, tokens_BC, number = jax.lax.while_loop(goes_on, step, (slots, tokens_BC, jnp.int32(0)))
    return slots, jax.sharding.reshard((tokens_BC, slots.removed_B, number), P())


def _choose(logits_BV: Array, tables: Tables | None, sampler: Sampler, slots: Slots) -> Slots:
    """The slots with their next tokens chosen, where they are not done."""

    def choose(logits_V: Array, tables: Tables | None, slot: Slots) -> Slots:
        position, state, left, removed = slot.position_B + 1, slot.state_B, slot.left_B, slot.removed_B
        # A key for each seed and position: independent of the batch and of where the prompt ended.
        key = jax.random.fold_in(jax.random.key(slot.seed_B), position)
        if tables is None:
            token = sampler(logits_V, key)
        else:
            # Half of what can be spared is held back for the MCUs to come, in equal parts: that keeps a tight budget
            # from leaving the last rows blank, and lets a rich part of the picture take more than its share.
            held = reserve(left, jnp.maximum(slot.begin_B, 1), slot.spare_B // 2)
            mask_V = allowed(tables, state, left, slot.limit_B - position - held)
            masked_V = jnp.where(mask_V, logits_V, -jnp.inf)
            removed += 1 - jnp.exp(jax.nn.logsumexp(masked_V) - jax.nn.logsumexp(logits_V))
            token = sampler(masked_V, key)
            state, left = advance(tables, state, left, token)
        new = slot._replace(token_B=token, position_B=position, state_B=state, left_B=left, removed_B=removed)
        return jax.tree.map(lambda old, new: jnp.where(slot.done_B, old, new), slot, new)

    # Rows are drawn where they are; the cache is not touched.
    rows, specs = slots._replace(cache=None), LAYOUT._replace(cache=None)
    local = jax.shard_map(
        jax.vmap(choose, (0, None, 0)),
        in_specs=(P(sharding.BATCH), P(), specs),
        out_specs=specs,
        check_vma=False,
    )
    return local(logits_BV, tables, rows)._replace(cache=slots.cache)
