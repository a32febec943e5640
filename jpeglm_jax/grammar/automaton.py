"""The finite automaton over bytes that accepts what an encoder of JPEG streams can write, and nothing else.

It is built in three steps. (1) One MCU as a graph over bits: Huffman codes, magnitudes, and the canonical form, in
which runs stay inside the block, ZRL is followed by a coefficient, and EOB stands where coefficients are left and only
there (F.1.2). (2) Eight bits at a time: 1-padding before a marker (F.1.2.3), a zero byte stuffed after FF (B.1.1.5),
markers. (3) States that no continuation tells apart are made one.

What MCU the stream is at is not in the state but in an integer beside it: `left`, the MCUs that are not complete yet.
Every transition says by its *effect* how it changes `left` and what it asks of it: which restart marker is due, and
whether the picture ends, follow from `left`. So the automaton of a subsampling serves every size and quality.

Two things are left to chance, which the standard leaves open too. DC differences may add up to a value that no 8-bit
picture has; decoders clamp it. And where the picture is not a whole number of MCUs, the blocks beyond its edge, which
decoders drop, may hold anything, while libjpeg writes flat ones (A.2.4). Clauses in parentheses are of ITU-T T.81.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jpeglm_jax.grammar.layout import EOI, RST0, Block, Layout

DEAD, FINISHED, START = 0, 1, 2
"""States: no stream passes here; after EOI; before the first MCU."""

UNBOUNDED = 2**30


class Effect(NamedTuple):
    """What a transition asks of the MCUs that are left, and how many it completes.

    It is open if `low <= left <= high` and, unless `phase` is -1, as many MCUs are complete as `phase`, modulo 8.
    """

    advance: int = 0
    low: int = 0
    high: int = UNBOUNDED
    phase: int = -1

    def is_open(self, left: int, mcus: int) -> bool:
        """With `left` of `mcus` MCUs left."""
        return self.low <= left <= self.high and self.phase in (-1, (mcus - left) % 8)

    def then(self, other: "Effect") -> "Effect":
        """Both, one after the other; NEVER where they cannot both be open."""
        phase = (other.phase - self.advance) % 8 if other.phase >= 0 else -1
        low, high = max(self.low, other.low + self.advance), min(self.high, other.high + self.advance)
        if low > high or (self.phase >= 0 and phase >= 0 and self.phase != phase):
            return NEVER
        return Effect(self.advance + other.advance, low, min(high, UNBOUNDED), max(self.phase, phase))


NEVER = Effect(0, 1, 0, -1)
NOTHING = Effect()


@dataclasses.dataclass(frozen=True)
class Automaton:
    """Transitions over bytes."""

    next: np.ndarray
    """State after each byte, uint16 (states, 256); DEAD where the byte may not stand."""
    effect: np.ndarray
    """Index into `effects`, uint8 (states, 256); 0, which is NEVER, where the byte may not stand."""
    effects: tuple[Effect, ...]

    def after(self, header: bytes) -> "Automaton":
        """This automaton with one more state for each byte of `header`, which lead, in turn, to START.

        The state before byte i of the header is `len(next before) + i`.
        """
        count = len(self.next)
        table = np.zeros((len(header), 256), self.next.dtype)
        effect = np.zeros((len(header), 256), np.uint8)
        places = np.arange(len(header)), np.frombuffer(header, np.uint8)
        table[places] = [*range(count + 1, count + len(header)), START]
        effect[places] = self.effects.index(NOTHING)
        return Automaton(np.concatenate([self.next, table]), np.concatenate([self.effect, effect]), self.effects)


def start_of(automaton: Automaton, layout: Layout) -> int:
    """The state before the first byte of an automaton with the layout's header."""
    return len(automaton.next) - len(layout.header)


def walk(automaton: Automaton, layout: Layout, data: bytes) -> tuple[int, int]:
    """Where a stream stands after its first bytes.

    Args:
      automaton: with the layout's header.
      layout: of the streams.
      data: the beginning of a stream, or all of it.

    Returns:
      The state and how many MCUs are not complete: FINISHED and 0 after a whole stream.

    Raises:
      ValueError: no stream begins so; the message names the byte, the MCU and what could have stood there.
    """
    state, left, mcus, effects = start_of(automaton, layout), layout.mcus, layout.mcus, automaton.effects
    for place, byte in enumerate(data):
        effect = effects[automaton.effect[state, byte]]
        if not effect.is_open(left, mcus):
            possible = [b for b, index in enumerate(automaton.effect[state]) if effects[index].is_open(left, mcus)]
            names = " or ".join(f"{b:02X}" for b in possible)
            names = names if len(possible) <= 4 else f"one of {len(possible)} others"
            where = "in the header" if place < len(layout.header) else f"after {mcus - left} of {mcus} MCUs"
            raise ValueError(f"byte {place} cannot be {byte:02X}: {where}, {names or 'nothing'} can follow")
        state, left = int(automaton.next[state, byte]), left - effect.advance
    return state, left


def build(layout: Layout) -> Automaton:
    """The minimal automaton of what follows the header."""
    bits, start = _mcu(layout.blocks)
    return _minimal(*_over_bytes(bits, start, layout.restart), start)


DONE = 1
"""Of the graph over bits: the MCU is complete. DEAD is 0."""


def _mcu(blocks: Sequence[Block]) -> tuple[np.ndarray, int]:
    """One MCU over bits: for each node the nodes after 0 and 1, int32 (nodes, 2), and the node before the first bit.

    Made from the end, with equal pairs made one node: the graph is minimal, and nothing in it leads nowhere.
    """
    rows = [(DEAD, DEAD), (DEAD, DEAD)]
    known = {(DEAD, DEAD): DEAD}

    def node(zero: int, one: int) -> int:
        if (zero, one) not in known:
            known[zero, one] = len(rows)
            rows.append((zero, one))
        return known[zero, one]

    def magnitude(size: int, then: int) -> int:
        for _ in range(size):  # every pattern of bits is some value of this size (F.1.2.1.1)
            then = node(then, then)
        return then

    def tree(leaves: dict[str, int]) -> int:
        level: dict[str, int] = {}
        for length in range(16, 0, -1):
            level |= {code: leaf for code, leaf in leaves.items() if len(code) == length}
            parents = {code[:-1] for code in level}
            level = {code: node(level.get(code + "0", DEAD), level.get(code + "1", DEAD)) for code in parents}
        return level.get("", DEAD)

    def block(spec: Block, end: int) -> int:
        # At position k: `free` may end the block, `bound` may not, since ZRL stands before it.
        free, bound = {64: end}, {}
        for k in range(63, 0, -1):
            leaves = {}
            for code, symbol in spec.ac.items():
                run, size = symbol >> 4, symbol & 15
                if 0 < size <= spec.sizes[min(k + run, 63)] and k + run <= 63:
                    leaves[code] = magnitude(size, free[k + run + 1])
                elif (run, size) == (15, 0) and k + 16 <= 63:
                    leaves[code] = bound[k + 16]
            bound[k] = tree(leaves)
            free[k] = tree(leaves | {code: end for code, symbol in spec.ac.items() if symbol == 0})
        return tree({code: magnitude(size, free[1]) for code, size in spec.dc.items() if size <= spec.sizes[0]})

    entry = DONE
    for spec in reversed(blocks):
        entry = block(spec, entry)
    return np.array(rows, np.int32), entry


def _over_bytes(bits: np.ndarray, start: int, restart: bool) -> tuple[np.ndarray, np.ndarray, list[Effect], int]:
    """The graph read a byte at a time, MCU after MCU.

    Where no marker follows an MCU, the 1s after it are padding if it was the last and else begin the next MCU: which,
    only `left` says. The nodes `ones[j]` are both at once, j bits after the MCU; until the byte ends the two readings
    agree.

    Returns:
      next, int32 (states, 256); effect, uint8 (states, 256); effects; the state after EOI.

    """
    ones, plain = [DONE], [start]
    if restart:
        bits = bits.copy()
        bits[DONE] = DEAD, DONE
    else:
        ones += range(len(bits), len(bits) + 7)
        for _ in ones[1:]:
            plain.append(bits[plain[-1], 1])
        bits = np.concatenate([bits, np.zeros((7, 2), np.int32)])
        bits[ones] = np.stack([bits[plain, 0], [*ones[1:], DEAD]], axis=1)
    between = np.zeros(len(bits), bool)
    between[ones] = True

    table, advance = np.arange(len(bits), dtype=np.int32)[:, None], np.zeros((len(bits), 1), np.uint8)
    for _ in range(8):
        step = bits[table]
        entered = (step == DONE) & (table != DONE)[..., None]
        table, advance = step.reshape(len(bits), -1), (advance[..., None] + entered).reshape(len(bits), -1)
    # How many MCUs must be left: those that the byte completes, and one more if it begins one.
    low = np.where(advance > 0, advance + ~between[table], 0)
    if restart:
        table[DONE] = DEAD
    else:
        table[ones], advance[ones] = table[plain], advance[plain]
        low[ones] = advance[ones] + ~between[table[ones]]

    effects, number = [NEVER, NOTHING], np.zeros(16, np.uint8)
    key = 4 * advance + low
    for each in np.flatnonzero(np.bincount(key[table != DEAD])).tolist():
        number[each] = _index(effects, Effect(each // 4, each % 4))
    effect = np.where(table == DEAD, 0, number[key])
    return *_add_after_ff(table, effect, effects, ones, start if restart else None), effects, len(bits)


def _add_after_ff(
    table: np.ndarray, effect: np.ndarray, effects: list[Effect], ones: Sequence[int], restart: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Next and effect with the states after EOI and, as many as are needed, after FF.

    Args:
      ones: the states in which a marker may come; the others need a stuffed zero after FF.
      restart: the state after restart markers; None if there are none.
    """
    finished = len(table)
    data = np.unique(table[:, 0xFF])[1:]  # the first is DEAD
    stuffed, second = finished + 1, finished + 1 + len(data)
    table = np.concatenate([table, np.zeros((1 + len(data) + len(ones), 256), np.int32)])
    effect = np.concatenate([effect, np.zeros((1 + len(data) + len(ones), 256), np.uint8)])
    table[stuffed:second, 0], effect[stuffed:second, 0] = data, _index(effects, NOTHING)
    due = [_index(effects, Effect(low=1, phase=(number + 1) % 8)) for number in range(8)] if restart is not None else []
    last = _index(effects, Effect(high=0))

    into = table[:finished, 0xFF]
    before, go_on = into[ones], into[ones] != DEAD
    into[into != DEAD] = stuffed + np.searchsorted(data, into[into != DEAD])
    for row, (here, target, goes_on) in enumerate(zip(ones, before, go_on), start=second):
        table[row, EOI], effect[row, EOI] = finished, last
        if restart is not None:
            table[row, RST0 : RST0 + 8], effect[row, RST0 : RST0 + 8] = restart, due
        elif goes_on:
            table[row, 0], effect[row, 0] = target, effect[here, 0xFF]
        table[here, 0xFF] = row
        effect[here, 0xFF] = _index(effects, NOTHING) if goes_on or restart is not None else last
    return table, effect


def _index(effects: list[Effect], effect: Effect) -> int:
    if effect not in effects:
        effects.append(effect)
    return effects.index(effect)


def _minimal(
    table: np.ndarray, effect: np.ndarray, effects: list[Effect], finished: int, start: int
) -> Automaton:
    """The states that occur, equivalent ones made one (Moore's refinement); DEAD, FINISHED and START come first."""
    reached = np.zeros(len(table), bool)
    reached[[DEAD, finished, start]] = True
    frontier = np.array([start])
    while len(frontier):
        found = np.unique(table[frontier])
        frontier = found[~reached[found]]
        reached[frontier] = True
    first_three = [DEAD, finished, start]
    kept = np.concatenate([first_three, np.setdiff1d(np.flatnonzero(reached), first_three)])
    number = np.zeros(len(table), np.int32)
    number[kept] = np.arange(len(kept))
    table, effect = number[table[kept]], effect[kept]

    # A row's signature: a random linear function of the groups after each byte and of the effects.
    random = np.random.default_rng(0)
    weights, marks = (random.integers(2**64, size=n, dtype=np.uint64) | np.uint64(1) for n in (256, len(kept)))
    outputs = marks[effect] @ weights[::-1]
    count, group = 0, np.zeros(len(kept), int)
    while group.max() + 1 > count:
        count = group.max() + 1
        signature = marks[group][table] @ weights + outputs
        signature[[DEAD, FINISHED]] = 0, 1
        _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
        order = np.argsort(first)  # groups are numbered by their first members: the three stay where they are
        group, first = np.argsort(order)[inverse], first[order]
    same = np.array_equal(group[table], group[table[first]][group]) and np.array_equal(effect, effect[first][group])
    assert same, "two different states got the same signature"
    assert len(first) < 2**16, "too many states for uint16"
    return Automaton(group[table[first]].astype(np.uint16), effect[first], tuple(effects))
