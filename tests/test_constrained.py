"""Every picture that is written under the grammar opens, and ends inside its budget; the judge is `t81`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t81
from test_grammar import photos, strict
from tiny import config, model

from jpeglm_jax import codecs, sharding, tokenizer
from jpeglm_jax import config as configs
from jpeglm_jax.config import JpegConfig, MeshConfig
from jpeglm_jax.evaluation import likelihood
from jpeglm_jax.grammar import tokens
from jpeglm_jax.sampling import command, complete
from jpeglm_jax.sampling.generate import generate
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import BOS, EOS, PAD

HOT = Sampler(2.0)
NOTHING = np.zeros(0, np.uint8)
SPARE = 400
"""Tokens beyond the shortest picture, at most."""


@dataclasses.dataclass(frozen=True)
class World:
    """A codec, a vocabulary, the grammar of both, and a model that has learned nothing."""

    codec: object
    vocabulary: tokenizer.Symbols | tokenizer.Bpe
    grammar: complete.Grammar
    model: object
    mesh: object
    least: int

    def write(self, prompts, limits, seeds=None, sampler=HOT, slots=16):
        """What `generate` gives."""
        seeds = range(len(prompts)) if seeds is None else seeds
        requests = [
            complete.request(self.vocabulary, prompt, seed, limit, self.grammar)
            for prompt, seed, limit in zip(prompts, seeds, limits)
        ]
        with jax.set_mesh(self.mesh):
            return generate(self.model, requests, sampler, self.grammar.tables, slots)

    def stream(self, picture) -> bytes:
        return self.vocabulary.decode(picture.tokens).tobytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Worlds by size and vocabulary, made once."""
    made = {}

    def get(size: int, kind: str) -> World:
        if (size, kind) not in made:
            codec = codecs.make(JpegConfig(size=size))
            vocabulary = tokenizer.Symbols(256)
            if kind == "bpe":
                path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
                vocabulary = tokenizer.train_bpe([codec.encode(picture) for picture in photos(size)], 320, path)
            grammar = complete.of(codec, vocabulary)
            mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
            with jax.set_mesh(mesh):
                untrained = model(vocab_size=vocabulary.vocab_size)
            least = complete.least_tokens(vocabulary, NOTHING, grammar)
            made[size, kind] = World(codec, vocabulary, grammar, untrained, mesh, least)
        return made[size, kind]

    return get


def limits(world: World, count: int) -> list[int]:
    """From the shortest picture upward; the last has all there is to spare."""
    return [world.least + number * number * SPARE // (count - 1) ** 2 for number in range(count)]


def check(world: World, pictures, limits, tmp_path):
    """Each is inside its limit, and libjpeg and the standard find nothing wrong with it."""
    for picture, limit in zip(pictures, limits, strict=True):
        assert picture.done and picture.tokens[-1] == EOS and len(picture.tokens) <= limit
        assert 0 < picture.removed < 1
        stream = world.stream(picture)
        # Decodes the coefficients, codes them again, and compares the bytes.
        assert t81.judge(world.codec.tables, world.codec.header, stream) == ""
        strict(world.codec, stream, tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_untrained_model_writes_files_that_open(world, tmp_path, kind):
    ours = world(64, kind)
    pictures = ours.write([NOTHING] * 48, limits(ours, 48))
    check(ours, pictures, limits(ours, 48), tmp_path)
    assert len({ours.stream(picture) for picture in pictures}) > 40
    if kind == "bytes":
        free = generate_freely(ours, 8)
        assert not any(t81.judge(ours.codec.tables, ours.codec.header, ours.stream(each)) == "" for each in free)


def generate_freely(ours: World, count: int):
    requests = [complete.request(ours.vocabulary, NOTHING, seed, ours.least + SPARE, None) for seed in range(count)]
    with jax.set_mesh(ours.mesh):
        return generate(ours.model, requests, HOT, None, 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("size", [64, 256])
def test_thousand_samples_open(world, tmp_path, size, kind):
    ours = world(size, kind)
    check(ours, ours.write([NOTHING] * 1000, limits(ours, 1000), slots=64), limits(ours, 1000), tmp_path)


def test_a_tight_budget_leaves_no_rows_blank(world):
    """Of the spare tokens, each MCU has at least half of an equal part for itself."""
    ours = world(64, "bytes")
    for picture in ours.write([NOTHING] * 16, [ours.least + SPARE] * 16):
        scan = np.frombuffer(ours.stream(picture), np.uint8)[len(ours.codec.header) :]
        mcus = np.diff([0, *np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] > 0))])
        assert len(mcus) == 16
        shortest = (ours.least - len(ours.codec.header) - 2) / 16
        # An MCU may end by itself before its share is used; it leaves the rest to those after it.
        assert mcus[8:].mean() > shortest + SPARE / 16 / 3, mcus


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_picture_is_completed_from_any_restart_marker(world, tmp_path, kind):
    ours = world(64, kind)
    stream = ours.codec.encode(photos(64)[1] // 8)  # dark: short prompts are few compilations
    prompts = [complete.beginning(ours.codec, stream, number / 16) for number in range(16)]
    least = [complete.least_tokens(ours.vocabulary, prompt, ours.grammar) for prompt in prompts]
    budgets = [short + 5 * number for number, short in enumerate(least)]
    budgets[0] = max(budgets[0], ours.least + SPARE)  # as long a cache as in the other tests: one compilation less
    pictures = ours.write(prompts, budgets)
    check(ours, pictures, budgets, tmp_path)
    for picture, prompt in zip(pictures, prompts):
        assert ours.stream(picture).startswith(prompt.tobytes())


def test_neither_slot_nor_neighbours_matter(world):
    ours = world(64, "bytes")
    budgets = limits(ours, 20)
    together = ours.write([NOTHING] * 20, budgets)
    others = ours.write([NOTHING] * 20, budgets, slots=3)
    assert [each.tokens.tolist() for each in together] == [each.tokens.tolist() for each in others]
    np.testing.assert_allclose([each.removed for each in together], [each.removed for each in others], atol=1e-4)


def test_temperature_zero_is_greedy_among_what_is_possible(world, tmp_path):
    ours = world(64, "bytes")
    first, second = ours.write([NOTHING] * 2, [ours.least + SPARE] * 2, seeds=[1, 2], sampler=Sampler(0.0))
    assert first.tokens.tolist() == second.tokens.tolist()
    check(ours, [first], [ours.least + SPARE], tmp_path)


def test_samples_are_read_and_judged(world):
    ours = world(64, "bytes")
    with jax.set_mesh(ours.mesh):
        arguments = (ours.model, ours.codec, ours.vocabulary, [NOTHING] * 16, range(16), HOT, ours.least + SPARE)
        assert all(sample.opens for sample in complete.complete(*arguments, ours.grammar, 16))
        assert not any(sample.opens for sample in complete.complete(*arguments, None, 16))
    stream = ours.codec.encode(photos(64)[0])
    assert complete.read_sample(ours.codec, stream).opens
    # A padding bit that is 0: Pillow says nothing.
    place = stream.tobytes().index(b"\xff\xd0") - 1
    wrong = stream.copy()
    wrong[place] &= 0xFE
    assert "padding" in complete.read_sample(ours.codec, wrong).problem


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_impossible_mass_is_what_the_mask_takes_from_held_out_pictures(world, kind):
    """Against a walk token by token, in rows that begin inside a picture, with padding, and with two pictures."""
    ours = world(64, kind)
    ids = [ours.vocabulary.encode(ours.codec.encode(photo)) for photo in photos(64)[:3]]
    length = 1800
    row = np.concatenate([ids[0][100:], ids[1], ids[2][:500]])[: length + 1]
    rows = np.stack([np.pad(part, (0, length + 1 - len(part)), constant_values=PAD) for part in (row, ids[1])])
    logits = np.asarray(jax.random.normal(jax.random.key(0), (2, length, ours.vocabulary.vocab_size)) * 3)
    impossible, saved, symbols = [], [], 0
    for row, row_logits in zip(rows, logits):
        state = None
        for token, target, logit in zip(row, row[1:], row_logits):
            if token == BOS:
                state = ours.grammar.tables.start, ours.grammar.tables.mcus
            elif token == EOS:
                state = None
            elif state and ours.vocabulary.spellings[token]:
                state = tuple(int(part) for part in tokens.advance(ours.grammar.tables, *state, token))
            if state and (ours.vocabulary.spellings[target] or target == EOS):
                mask = tokens.allowed(ours.grammar.tables, *state, 2**29)
                assert mask[target]
                mass = np.exp(logit - np.logaddexp.reduce(logit))
                impossible.append(mass[~mask].sum())
                saved.append(-np.log(mass[mask].sum()))
                symbols += len(ours.vocabulary.spellings[target])
    assert len(impossible) > 500
    with jax.set_mesh(ours.mesh):
        batch = likelihood.place({"inputs": rows[:, :-1], "targets": rows[:, 1:]})
        put = jax.device_put(logits, jax.NamedSharding(ours.mesh, sharding.BTV))
        lengths = jnp.asarray(ours.vocabulary.lengths)
        totals = jax.jit(likelihood._grammar_sums)(put, batch, lengths, ours.grammar.tables)
    assert totals["known"] == len(impossible) and totals["known_symbols"] == symbols
    np.testing.assert_allclose(totals["impossible"], np.sum(impossible), rtol=1e-4)
    np.testing.assert_allclose(totals["saved"], np.sum(saved), rtol=1e-4)
    values = likelihood.summary({"nll": 900.0, "tokens": 100.0, "symbols": 100.0, **totals})
    assert values["impossible_mass"] == pytest.approx(np.mean(impossible), rel=1e-4)
    gain = values["bits_per_byte"] - values["bits_per_byte_masked"]
    assert gain == pytest.approx(np.sum(saved) / symbols / np.log(2), rel=1e-4)


# What cannot be


def test_prompts_and_budgets_that_cannot_be_are_refused(world):
    ours = world(64, "bytes")
    other = codecs.make(JpegConfig(size=80)).encode(photos(80)[0])
    gray = codecs.make(JpegConfig(size=64, subsampling="gray")).encode(photos(64)[0])
    stream = ours.codec.encode(photos(64)[0])
    for prompt, message in (
        (other, "not the beginning of a picture of this codec: byte .* in the header"),
        (gray, "not the beginning of a picture of this codec: byte .* in the header"),
        (stream, "a whole picture: nothing is left to write"),
        (stream[:-1][::-1], "not the beginning"),
    ):
        with pytest.raises(ValueError, match=message):
            complete.request(ours.vocabulary, prompt, 0, 999, ours.grammar)
    with pytest.raises(ValueError, match="ratio 1.0 keeps the whole picture: nothing is left to write"):
        complete.beginning(ours.codec, stream, 1.0)
    with pytest.raises(ValueError, match=f"max_tokens must be at least {ours.least}, not {ours.least - 1}"):
        ours.write([NOTHING], [ours.least - 1])


def test_the_command_refuses_before_a_model_is_loaded(world, tmp_path):
    settings = config(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(settings))
    (tmp_path / "notes.txt").write_text("not a picture")
    codec = codecs.make(settings.codec)
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(codec.to_file(codec.encode(photos(48)[0])))

    def sample(prompt="", ratio=0.5, max_tokens=None, constrained=True):
        out = str(tmp_path / "out")
        command.sample(str(tmp_path), str(prompt), ratio, [0], Sampler(), max_tokens, constrained, out)

    with pytest.raises(ValueError, match="notes.txt cannot be read"):
        sample(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="missing.jpg cannot be read"):
        sample(tmp_path / "missing.jpg")
    with pytest.raises(ValueError, match="ratio 1 keeps the whole picture"):
        sample(picture, 1)
    with pytest.raises(ValueError, match=r"ratio must be from 0 to 1, not -0.1"):
        sample(picture, -0.1)
    with pytest.raises(ValueError, match="max_tokens must be at least [0-9]+, what the shortest picture takes, not 50"):
        sample(max_tokens=50)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        sample()
