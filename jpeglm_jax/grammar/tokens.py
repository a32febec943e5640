"""The automaton over tokens, as arrays that a sampler only looks up.

A position in a picture is a pair of integers: `state`, a row of the tables, and `left`, the MCUs that are not complete.
Of every row and token the tables say which row is next and by which *effect*; of every effect, what it asks of `left`
and how much it takes from it. So a token that spells the end of an MCU, restart marker number 3 and the beginning of
the next MCU is one entry like any other, open only where marker 3 is due; and no entry knows the size of the picture.

`least` is the promise to finish: the tokens that the shortest end of the picture takes, EOS included. It depends on
`left`, but from some row on only by a constant every `period` MCUs, so a few rows of it serve pictures of any size. A
sampler that opens only what leaves at least that much of its budget never runs out of it, and always has a choice.

`Tables` is a tuple of arrays and integers, hence a pytree. `allowed` and `advance` index and compare and call no
library, so they serve numpy arrays and, inside `jax.jit`, traced ones; both are of one sequence, to be vmapped over a
batch:

    tables = jax.device_put(grammar.tables)
    mask = jax.vmap(allowed, (None, 0, 0, 0))(tables, state, left, budget)             # bool (batch, vocab)
    token = jax.random.categorical(key, jnp.where(mask, logits, -jnp.inf))             # (batch,)
    state, left = jax.vmap(advance, (None, 0, 0, 0))(tables, state, left, token)
    budget = jnp.maximum(budget - 1, 1)                                                # after EOS only EOS is open
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpeglm_jax.grammar.automaton import FINISHED, UNBOUNDED, Automaton, Effect


class Tables(NamedTuple):
    """The grammar over a vocabulary, for pictures of `mcus` MCUs. Row 0 is where no picture passes."""

    next: np.ndarray
    """Row after each token, uint16 (rows, vocab)."""
    effect: np.ndarray
    """Effect of each token, uint8 (rows, vocab); 0 is never open. uint16 if there are more than 256 effects."""
    low: np.ndarray
    high: np.ndarray
    """An effect is open if low <= left <= high, int32 (effects,) each,"""
    phase: np.ndarray
    """and phase is -1 or the number of complete MCUs modulo 8, int32 (effects,)."""
    steps: np.ndarray
    """MCUs that an effect completes, int32 (effects,)."""
    least: np.ndarray
    """Tokens of the shortest end by MCUs left, int32 (lefts, rows); 2**30 where there is none. For more MCUs than there
    are lines, the last `period` lines repeat, each time with `gain` more."""
    period: int
    gain: int
    mcus: int
    """MCUs of the picture."""
    start: int
    """Row before the first byte."""
    end: int
    """Row after EOS, at which EOS is all there is, without cost."""


def allowed(tables: Tables, state, left, budget):
    """Which tokens may come next.

    Args:
      tables: of numpy or jax arrays.
      state: integer, the row.
      left: integer, MCUs that are not complete.
      budget: integer, tokens that may yet be written, EOS among them.

    Returns:
      bool (vocab,): the token continues a stream that the encoder can write and that can end inside the budget. Never
      empty if `budget >= shortest(tables, state, left)`, nor, then, after any of these tokens with a budget one less.
    """
    # What depends on the effect alone is worked out once for each effect, not for each token.
    complete = (tables.mcus - left) % 8
    fits = (tables.low <= left) & (left <= tables.high) & ((tables.phase < 0) | (tables.phase == complete))
    line, more = _line(tables, left - tables.steps)
    room = fits * (budget - more)
    effect = tables.effect[state]
    return tables.least[line[effect], tables.next[state]] < room[effect]


def advance(tables: Tables, state, left, token):
    """Row and MCUs left, int32, after a token that `allowed` opens."""
    return tables.next[state, token].astype("int32"), left - tables.steps[tables.effect[state, token]]


def shortest(tables: Tables, state, left):
    """Least number of tokens from here to the end of the picture, EOS included; `state` and `left` broadcast.

    2**30 or more where no picture passes; of no meaning if `left` is below 0.
    """
    line, more = _line(tables, left)
    return tables.least[line, state] + more


def _line(tables: Tables, left):
    """The line of `least` for these MCUs left, and what comes on top of it."""
    beyond = left - (tables.least.shape[0] - 1)
    laps = (beyond > 0) * ((beyond + tables.period - 1) // tables.period)
    line = left - laps * tables.period
    return line * (line > 0), laps * tables.gain


def reserve(left, mcus: int, spare):
    """Tokens to hold back for the MCUs after this one, so that a tight budget does not leave the last rows blank.

    Of the `spare` tokens, budget less shortest end, that there were when `mcus` MCUs were left, each MCU gets an equal
    part; what an MCU does not use stays for those after it. A sampler passes `budget - reserve(...)` to `allowed`.
    Since the reserve never grows from one token to the next, the mask is still never empty.

    Args:
      left: integer, MCUs that are not complete now.
      mcus: MCUs that were not complete when sampling began; 1 or more.
      spare: integer, tokens to share.

    Returns:
      float, whole tokens from 0 to `spare`.
    """
    others = left - (left > 0)
    return (others * (spare / mcus)) // 1


def check_vocabulary(spellings: Sequence[bytes], eos: int) -> None:
    """Whether a vocabulary can spell every stream.

    Raises:
      ValueError: a byte is no token by itself, or `eos` is not an id that spells nothing.
    """
    missing = sorted(set(range(256)) - {spelling[0] for spelling in spellings if len(spelling) == 1})
    if missing:
        names = ", ".join(f"{byte:02X}" for byte in missing[:8]) + ", ..." * (len(missing) > 8)
        raise ValueError(f"the vocabulary cannot spell every picture: it has no token for the single bytes {names}")
    if not 0 <= eos < len(spellings) or spellings[eos]:
        raise ValueError(f"token {eos} cannot mark the end of a picture: it must be an id that spells no bytes")


def lift(automaton: Automaton, spellings: Sequence[bytes], eos: int) -> tuple[np.ndarray, np.ndarray, list[Effect]]:
    """Transitions over tokens: each is its bytes, one after the other, with their effects made one.

    Args:
      automaton: over bytes, header included.
      spellings: the bytes of each token id; b"" for ids that spell nothing (specials, a dummy prefix): never open.
      eos: id of the token that ends a picture, after EOI and there only.

    Returns:
      next, uint16 (rows + 1, vocab): the last row is after EOS; effect, unsigned (rows + 1, vocab); the effects.
    """
    count = len(automaton.next)
    effects = list(automaton.effects)
    known = {effect: index for index, effect in enumerate(effects)}
    next_by_byte, effect_by_byte = np.ascontiguousarray(automaton.next.T), np.ascontiguousarray(automaton.effect.T)
    table = np.zeros((len(spellings), count + 1), np.uint16)
    effect = np.zeros(table.shape, np.uint16)
    for token, spelling in enumerate(spellings):
        if not spelling:
            continue
        rows = np.flatnonzero(effect_by_byte[spelling[0]])
        state, sofar = next_by_byte[spelling[0], rows], effect_by_byte[spelling[0], rows]
        for byte in spelling[1:]:
            pairs = sofar.astype(np.uint32) << 16 | effect_by_byte[byte, state]
            sofar = np.zeros(len(rows), np.uint16)
            for pair in np.unique(pairs).tolist():
                both = effects[pair >> 16].then(effects[pair & 0xFFFF])
                if both not in known:
                    known[both] = len(effects)
                    effects.append(both)
                sofar[pairs == pair] = known[both]
            alive = sofar > 0
            rows, state, sofar = rows[alive], next_by_byte[byte, state[alive]], sofar[alive]
        table[token, rows], effect[token, rows] = state, sofar
    table[eos, [FINISHED, count]], effect[eos, [FINISHED, count]] = count, known[Effect(high=0)]
    return np.ascontiguousarray(table.T), np.ascontiguousarray(effect.T, np.min_scalar_type(len(effects) - 1)), effects


def tabulate(automaton: Automaton, start: int, mcus: int, spellings: Sequence[bytes], eos: int) -> Tables:
    """The tables of a vocabulary; arguments as of `lift`, with the row before the first byte."""
    table, effect, effects = lift(automaton, spellings, eos)
    steps, low, high, phase = (np.array(column, np.int32) for column in zip(*effects))
    least, period, gain = _least(table, effect, effects, mcus)
    return Tables(table, effect, low, high, phase, steps, least, period, gain, mcus, start, len(table) - 1)


def _least(table: np.ndarray, effect: np.ndarray, effects: Sequence[Effect], mcus: int) -> tuple[np.ndarray, int, int]:
    """`least`, `period` and `gain` of the tables: one breadth-first search, backwards, for each number of MCUs left.

    How many tokens an end takes follows, by the same rule for each line, from a few lines before it. So once a line,
    and as many before it as the rule looks back, repeat those of `period` lines earlier but for a constant, all further
    ones do.
    """
    edges = np.sort(table.astype(np.uint32) << 16 | effect, axis=1)
    distinct = (edges & 0xFFFF) > 0
    distinct[:, 1:] &= edges[:, 1:] != edges[:, :-1]
    source = np.repeat(np.arange(len(table)), distinct.sum(axis=1))
    target, kind = edges[distinct] >> 16, edges[distinct] & 0xFFFF
    steps = np.array([each.advance for each in effects])
    inside = steps[kind] == 0
    crossing = source[~inside], target[~inside], kind[~inside]
    order = np.argsort(target[inside], kind="stable")
    source, kind = source[inside][order], kind[inside][order]
    begins = np.searchsorted(target[inside][order], np.arange(len(table) + 1))

    reach = max(1, int(steps.max()))
    special = max(max(each.low, each.high * (each.high < UNBOUNDED)) for each in effects)
    lap = 8 if any(each.phase >= 0 for each in effects) else 1
    lines: list[np.ndarray] = []
    for left in range(mcus + 1):
        is_open = np.array([each.is_open(left, mcus) for each in effects])
        line = np.full(len(table), UNBOUNDED, np.int32)
        if left == 0:
            line[-1] = 0
        else:
            begin, end, how = (part[is_open[crossing[2]]] for part in crossing)
            np.minimum.at(line, begin, 1 + np.stack(lines[::-1][:reach])[steps[how] - 1, end])
        lines.append(_spread(line, source, begins, is_open[kind]))
        for period in range(lap, min(16 * lap, left - reach - special) + 1, lap):
            gain = _gain(lines[left], lines[left - period])
            if gain is not None and all(gain == _gain(lines[left - i], lines[left - i - period]) for i in range(reach)):
                return np.stack(lines), period, gain
    return np.stack(lines), 1, 0


def _spread(line: np.ndarray, source: np.ndarray, begins: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """Lowers `line` until no open edge leads to a row more than 1 lower; edges into row r are begins[r]:begins[r+1]."""
    for distance in range(UNBOUNDED):
        rows = np.flatnonzero(line == distance)
        if not len(rows) and not (line[line < UNBOUNDED] > distance).any():
            return line
        counts = begins[rows + 1] - begins[rows]
        edges = np.repeat(begins[rows + 1] - counts.cumsum(), counts) + np.arange(counts.sum())
        before = source[edges[is_open[edges]]]
        line[before] = np.minimum(line[before], distance + 1)
    raise AssertionError


def _gain(line: np.ndarray, earlier: np.ndarray) -> int | None:
    """The constant between two lines, None if there is none."""
    finite = line < UNBOUNDED
    gains = np.unique(line[finite] - earlier[finite])
    return int(gains[0]) if len(gains) == 1 and np.array_equal(finite, earlier < UNBOUNDED) else None
