"""What the automaton accepts is what the encoder can write, over bytes and over tokens; the judge is `t81`."""

import io
import logging
import math
import pathlib
import shutil
import subprocess

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import t81
from PIL import Image, ImageDraw

from jpeglm_jax import grammar, tokenizer
from jpeglm_jax.codecs import jpeg
from jpeglm_jax.config import JpegConfig
from jpeglm_jax.grammar import automaton, cache, tokens
from jpeglm_jax.grammar.diagnose import diagnose
from jpeglm_jax.grammar.layout import read_layout

SIZE = 48
"""A multiple of every MCU size, so that jpegtran has no blocks beyond the picture to make anew."""
LAYOUTS = [(subsampling, restart) for subsampling in ("4:2:0", "4:2:2", "4:4:4", "gray") for restart in (True, False)]
BYTES = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]
EOS = 2
PLENTY = 2**29

layouts = pytest.mark.parametrize("subsampling, restart", LAYOUTS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("grammars")


@pytest.fixture(scope="session")
def make(folder):
    """Codec and grammar of some settings, made once."""
    made = {}

    def get(spellings=BYTES, caps=False, **settings):
        settings = {"size": SIZE, **settings}
        key = (*settings.items(), caps, tuple(spellings))
        if key not in made:
            codec = jpeg.Codec(JpegConfig(**settings))
            made[key] = codec, grammar.make(codec, spellings, EOS, caps=caps, folder=folder)
        return made[key]

    return get


def photos(size: int) -> list[np.ndarray]:
    """From files that come with scikit-image and scikit-learn."""
    images = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    images += [np.stack([skimage.data.camera()] * 3, -1), *sklearn.datasets.load_sample_images().images]
    return [np.array(Image.fromarray(image).resize((size, size))) for image in images]


def pictures(size: int, seed: int = 0) -> list[np.ndarray]:
    """Photos, noise, gradients, one colour, drawings, extreme contrast."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, size)
    checks = np.indices((size, size)).sum(0) % 2 * 255
    planes = [np.add.outer(ramp, ramp) / 2, np.outer(ramp, ramp) / 255, checks, (checks[::-1] + ramp) / 2]
    planes += [np.full((size, size), value) for value in (0, 1, 127, 128, 255)]
    planes += [rng.integers(0, 2, (size, size)) * 255, np.kron(rng.integers(0, 2, (9, 9)), np.full((8, 8), 255))]
    drawings = []
    for _ in range(4):
        image = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
        for _ in range(6):
            box = np.sort(rng.integers(0, size, (2, 2)), axis=0).ravel().tolist()
            ImageDraw.Draw(image).ellipse(box, tuple(rng.integers(0, 256, 3).tolist()))
        drawings.append(np.array(image))
    noise = [rng.integers(0, 256, (size, size, 3)), np.clip(rng.normal(128, 9, (size, size, 3)), 0, 255)]
    planes = [np.broadcast_to(np.resize(plane, (size, size))[..., None], (size, size, 3)) for plane in planes]
    return photos(size) + [np.ascontiguousarray(picture.astype(np.uint8)) for picture in [*planes, *drawings, *noise]]


def accepts(layout, machine, stream: bytes) -> bool:
    try:
        return automaton.walk(machine, layout, stream) == (automaton.FINISHED, 0)
    except ValueError:
        return False


def mutations(streams: list[bytes], header: int, count: int, seed: int):
    """Streams with one to three changes behind the header: a bit, a byte, one more, one fewer, parts moved or cut."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        stream = bytearray(streams[number % len(streams)])
        for _ in range(rng.integers(1, 4)):
            place, other = np.sort(rng.integers(header, len(stream), 2)) if len(stream) > header else (header, header)
            match rng.integers(7):
                case 0:
                    stream[place:other] = b""
                case 1:
                    stream[place : place + 1] = bytes([rng.integers(256)])
                case 2:
                    stream.insert(place, rng.choice([0, 255, rng.integers(256)]))
                case 3:
                    del stream[place : place + 1]
                case 4:
                    stream[place:place] = stream[other : other + rng.integers(1, 9)]
                case _:
                    # The likeliest to stay valid: magnitude bits may be anything.
                    stream[place : place + 1] = bytes(byte ^ 1 << rng.integers(8) for byte in stream[place : place + 1])
        yield bytes(stream)


def agreement(codec, layout, machine, streams) -> np.ndarray:
    """Counts of streams by (judge, automaton); the words of `diagnose` must agree with the automaton."""
    table = np.zeros((2, 2), int)
    for stream in streams:
        ours = accepts(layout, machine, stream)
        assert diagnose(layout, codec.tables, stream).valid == ours, stream.hex()
        table[int(t81.judge(codec.tables, codec.header, stream) == ""), int(ours)] += 1
    return table


def write(tables, rng, budget: int = PLENTY, pace: bool = False, state=None, left=None, choose=None) -> list[int]:
    """Tokens drawn evenly from the mask until EOS."""
    state, left = tables.start if state is None else state, tables.mcus if left is None else left
    begin, spare, ids = left, budget - int(tokens.shortest(tables, state, left)), []
    while state != tables.end:
        held = tokens.reserve(left, begin, spare) if pace else 0
        mask = tokens.allowed(tables, state, left, budget - held)
        assert mask.any(), "the mask is empty before the end"
        token = int((choose or rng.choice)(np.flatnonzero(mask)))
        ids.append(token)
        state, left = (int(part) for part in tokens.advance(tables, state, left, token))
        budget -= 1
    assert budget >= 0
    return ids


def spell(spellings, ids) -> bytes:
    return b"".join(spellings[token] for token in ids)


# Accepted == encodable


@layouts
def test_accepts_every_picture(make, subsampling, restart):
    for quality in (1, 25, 75, 100):
        codec, ours = make(subsampling=subsampling, restart=restart, quality=25)
        codec = jpeg.Codec(JpegConfig(size=SIZE, subsampling=subsampling, restart=restart, quality=quality))
        assert codec.header == ours.layout.header, "quality must not change the grammar"
        streams = [codec.encode(picture).tobytes() for picture in pictures(SIZE)]
        assert agreement(codec, ours.layout, ours.automaton, streams).tolist() == [[0, 0], [0, len(streams)]]


def check_mutations(make, subsampling, restart, count):
    codec, ours = make(subsampling=subsampling, restart=restart)
    streams = [codec.encode(picture).tobytes() for picture in pictures(SIZE)]
    table = agreement(codec, ours.layout, ours.automaton, mutations(streams, len(codec.header), count, seed=1))
    assert table[0, 1] == table[1, 0] == 0, table
    assert table[0, 0] > count / 4 and table[1, 1] > count / 40, f"one-sided mutations prove nothing: {table}"


@layouts
def test_judges_mutations_like_t81(make, subsampling, restart):
    check_mutations(make, subsampling, restart, 700)


@pytest.mark.slow
@layouts
def test_judges_thousands_of_mutations_like_t81(make, subsampling, restart):
    check_mutations(make, subsampling, restart, 2500)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    layout=st.sampled_from(LAYOUTS), size=st.integers(1, 70), quality=st.integers(1, 100), seed=st.integers(0, 2**32)
)
def test_accepted_is_encodable_at_any_size_and_quality(folder, layout, size, quality, seed):
    rng = np.random.default_rng(seed)
    codec = jpeg.Codec(JpegConfig(size=size, subsampling=layout[0], restart=layout[1], quality=quality))
    picture = np.clip(rng.normal(rng.integers(256), rng.integers(1, 200), (size, size, 3)), 0, 255).astype(np.uint8)
    stream = codec.encode(picture).tobytes()
    layout, machine = grammar.bytewise(codec, folder=folder)
    assert accepts(layout, machine, stream)
    assert not any(accepts(layout, machine, stream[:end]) for end in (0, len(stream) // 2, len(stream) - 1))
    table = agreement(codec, layout, machine, mutations([stream], len(codec.header), 3, seed))
    assert table[0, 1] == table[1, 0] == 0


@pytest.mark.parametrize("settings", [{"quality": 25}, {"quality": 60, "subsampling": "4:2:2", "restart": False}])
def test_caps_accept_every_picture(make, settings):
    codec, capped = make(caps=True, **settings)
    for picture in pictures(SIZE):
        assert accepts(capped.layout, capped.automaton, codec.encode(picture).tobytes())


@pytest.mark.parametrize("quality", [1, 5, 25, 90])
def test_caps_refuse_what_the_quantiser_cannot_make(make, quality):
    """Against pictures made to have the largest coefficients: the signs of one basis function each."""
    codec, capped = make(subsampling="gray", quality=quality, caps=True)
    angles = (2 * np.arange(SIZE) + 1) * np.pi / 16
    for u in range(8):
        for v in range(8):
            sign = np.sign(np.outer(np.cos(v * angles), np.cos(u * angles)))
            for plane in (sign, -sign):
                picture = np.repeat(np.where(plane > 0, 255, 0)[..., None], 3, -1).astype(np.uint8)
                assert accepts(capped.layout, capped.automaton, codec.encode(picture).tobytes())
    stream = spell(BYTES, write(capped.tables, np.random.default_rng(0)))
    assert t81.judge(codec.tables, codec.header, stream) == ""
    sizes = np.array(capped.layout.blocks[0].sizes)
    plain = np.array([11] + [10] * 63)
    assert (sizes <= plain).all() and (quality > 50 or (sizes < plain).all())
    free = [spell(BYTES, write(make(subsampling="gray")[1].tables, np.random.default_rng(seed))) for seed in range(5)]
    assert quality > 50 or not any(accepts(capped.layout, capped.automaton, stream) for stream in free)


def code(table: dict[str, int], symbol: int) -> str:
    return next(bits for bits, value in table.items() if value == symbol)


def crafted(codec, layout, block: str) -> bytes:
    """A picture whose first block is these bits, and whose other blocks are one colour."""
    first, *others = layout.blocks
    flat = [code(each.dc, 0) + code(each.ac, 0) for each in layout.blocks]
    out = bytearray(codec.header)
    for mcu in range(layout.mcus):
        bits = (block if mcu == 0 else flat[0]) + "".join(flat[1:])
        bits += "1" * (-len(bits) % 8)
        for byte in (int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)):
            out += bytes([byte, 0]) if byte == 0xFF else bytes([byte])
        out += bytes([0xFF, 0xD9 if mcu == layout.mcus - 1 else 0xD0 + mcu % 8])
    return bytes(out)


def test_names_the_rule_that_is_broken(make):
    codec, ours = make()
    luma = ours.layout.blocks[0]
    dc, eob, zrl = code(luma.dc, 0), code(luma.ac, 0), code(luma.ac, 0xF0)
    one = code(luma.ac, 0x01) + "1"
    far = code(luma.ac, 0xF1) + "0"
    cases = {
        dc + eob: "",
        dc + one * 63: "",
        dc + zrl * 3 + code(luma.ac, 0xE1) + "1": "",
        code(luma.dc, 11) + "0" * 11 + eob: "",
        dc + zrl + eob: "byte 61, MCU 0, block Y 0, coefficient 17: EOB after ZRL",
        dc + one * 62 + zrl: "coefficient 63: a run of zeros leads to coefficient 79",
        dc + far * 4 + one: "coefficient 49: a run of zeros leads to coefficient 64",
        dc + zrl * 4: "coefficient 49: a run of zeros leads to coefficient 65",
        dc + "1" * 16: "block Y 0, coefficient 1: no Huffman code begins with 1111111111111111",
        "1" * 16: "block Y 0, coefficient 0: no Huffman code begins with 1111111111111111",
    }
    for block, problem in cases.items():
        stream = crafted(codec, ours.layout, block)
        verdict = diagnose(ours.layout, codec.tables, stream)
        assert problem in str(verdict) and verdict.valid == (not problem), (str(verdict), problem)
        judged = t81.judge(codec.tables, codec.header, stream) == ""
        assert judged == verdict.valid == accepts(ours.layout, ours.automaton, stream)
    # An EOB after coefficient 63 is read as the next block's beginning: nothing marks it, but the MCU no longer ends.
    after_63 = crafted(codec, ours.layout, dc + one * 63 + eob)
    assert t81.judge(codec.tables, codec.header, after_63) and not accepts(ours.layout, ours.automaton, after_63)


def test_names_the_marker_or_padding_that_is_wrong(make):
    codec, ours = make()
    stream = crafted(codec, ours.layout, code(ours.layout.blocks[0].dc, 1) + "1" + code(ours.layout.blocks[0].ac, 0))
    assert diagnose(ours.layout, codec.tables, stream).valid
    begin, mcus = len(codec.header), ours.layout.mcus
    first = stream.index(b"\xff\xd0")
    cases = {
        stream[: first - 1] + bytes([stream[first - 1] & 0xFE]) + stream[first:]: "padding bits",
        stream.replace(b"\xff\xd1", b"\xff\xd2", 1): "MCU 2: FFD2 where restart marker 1 (FFD1) must stand",
        stream[: first + 1] + b"\xd9" + stream[first + 2 :]: "FFD9 where restart marker 0",
        stream[:begin] + b"\xff\xd3" + stream[begin:]: "MCU 0, block Y 0, coefficient 0: marker FFD3 where coded",
        stream[:-2]: "the end of the file where EOI",
        stream[:-1]: "FF where EOI",
        stream[: begin + 1]: f"byte {begin + 1}, MCU 0",
        stream + b"\0": "1 bytes after the end",
        stream[:-2] + b"\xff\xd0" + stream[-2:]: "FFD0 where EOI (FFD9) must stand",
        b"": "empty",
        b"GIF89a": "byte 0: not a JPEG file",
        stream[:25]: "byte 20: segment SOF0 (baseline) is cut off",
        stream[:20]: "byte 20: segment SOF0 (baseline) expected",
    }
    for data, problem in cases.items():
        verdict = diagnose(ours.layout, codec.tables, data)
        assert problem in str(verdict) and not verdict.valid, (str(verdict), problem)
        assert not accepts(ours.layout, ours.automaton, data)
    with pytest.raises(ValueError, match=rf"byte {first + 1} cannot be D9: after 1 of {mcus} MCUs, D0 can follow"):
        ours.walk(stream[: first + 1] + b"\xd9")
    with pytest.raises(ValueError, match="byte 3 cannot be 00: in the header, E0 can follow"):
        ours.walk(stream[:3] + b"\0")
    with pytest.raises(ValueError, match="nothing can follow"):
        ours.walk(stream + b"\0")


def test_checks_complete_files(make):
    codec, ours = make()
    picture = Image.fromarray(photos(SIZE)[0])

    def verdict(image=picture, **options):
        file = io.BytesIO()
        image.save(file, "JPEG", **{"quality": 25, "subsampling": "4:2:0", "restart_marker_blocks": 1, **options})
        return str(diagnose(ours.layout, codec.tables, file.getvalue()))

    stream = codec.encode(np.array(picture))
    assert str(diagnose(ours.layout, codec.tables, codec.to_file(stream))) == "valid"
    assert str(diagnose(ours.layout, codec.tables, stream.tobytes())) == "valid"
    assert verdict() == "valid"
    assert "quantisation tables" in verdict(quality=26)
    assert "Huffman tables" in verdict(optimize=True)
    assert "progressive" in verdict(progressive=True)
    assert "components or subsampling" in verdict(subsampling="4:4:4")
    assert "1 components, this codec has 3" in verdict(picture.convert("L"))
    assert "49x48, this codec's are 48x48" in verdict(picture.resize((49, 48)))
    assert "restart interval" in verdict(restart_marker_blocks=0)
    assert "restart interval" in verdict(restart_marker_blocks=2)
    assert "a comment" in verdict(comment="hello")
    assert "cut off" in str(diagnose(ours.layout, codec.tables, codec.to_file(stream)[:100]))


# Random walks over the mask


@layouts
def test_what_the_mask_lets_through_is_a_stream(make, tmp_path, subsampling, restart):
    codec, ours = make(subsampling=subsampling, restart=restart)
    for seed in range(4):
        stream = spell(BYTES, write(ours.tables, np.random.default_rng(seed)))
        assert t81.judge(codec.tables, codec.header, stream) == ""
        strict(codec, stream, tmp_path)


@pytest.mark.slow
@layouts
def test_thousand_walks_are_streams(make, tmp_path, subsampling, restart):
    codec, ours = make(subsampling=subsampling, restart=restart)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        budget = int(tokens.shortest(ours.tables, ours.tables.start, ours.tables.mcus)) + rng.integers(2000)
        stream = spell(BYTES, write(ours.tables, rng, budget, pace=seed % 2 == 0))
        assert t81.judge(codec.tables, codec.header, stream) == ""
        if seed % 20 == 0:
            strict(codec, stream, tmp_path)


def strict(codec, stream: bytes, tmp_path):
    """libjpeg's own opinion: any warning is an error; the coefficients, coded again, are the same scan."""
    if not shutil.which("djpeg") or not shutil.which("jpegtran"):
        return
    file = tmp_path / "file.jpg"
    file.write_bytes(codec.to_file(np.frombuffer(stream, np.uint8)))
    subprocess.run(["djpeg", "-strict", "-outfile", "/dev/null", file], check=True, stderr=subprocess.PIPE)
    command = ["jpegtran", "-strict", "-restart", "1B" if codec.config.restart else "0", file]
    again = subprocess.run(command, check=True, capture_output=True).stdout
    assert again.endswith(stream[len(codec.header) :])


def test_refuses_nothing_that_libjpeg_writes_between_restarts_and_without(make, tmp_path):
    """A walk without markers, given markers by jpegtran, is a stream of the other codec, and the other way round."""
    if not shutil.which("jpegtran"):
        pytest.skip("no jpegtran")
    (plain, plain_grammar), (marked, marked_grammar) = make(restart=False), make(restart=True)
    for (source, ours), (other, theirs), interval in (
        ((plain, plain_grammar), (marked, marked_grammar), "1B"),
        ((marked, marked_grammar), (plain, plain_grammar), "0"),
    ):
        stream = source.encode(photos(SIZE)[1])
        (tmp_path / "a.jpg").write_bytes(source.to_file(stream))
        file = subprocess.run(
            ["jpegtran", "-strict", "-restart", interval, tmp_path / "a.jpg"], check=True, capture_output=True
        ).stdout
        assert str(diagnose(theirs.layout, other.tables, file)) == "valid"
        assert not diagnose(ours.layout, source.tables, file).valid


# Tokens


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> tokenizer.Bpe:
    """A vocabulary in the published format, with pairs across markers."""
    codec = jpeg.Codec(JpegConfig(size=256))
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    return tokenizer.train_bpe([codec.encode(picture) for picture in photos(256)], 320, path)


@pytest.fixture(scope="session")
def bpe(learned) -> list[bytes]:
    spellings = [learned.decode(np.array([token])).tobytes() for token in range(learned.vocab_size)]
    assert any(b"\xff\xd0" in spelling for spelling in spellings), "no token holds a marker: tests of it prove nothing"
    return spellings


def substrings(codec, count: int, seed: int) -> list[bytes]:
    """Parts of streams, up to whole MCUs and the end: harsher than any learned vocabulary."""
    rng = np.random.default_rng(seed)
    streams = [codec.encode(picture).tobytes() for picture in pictures(codec.config.size)]
    found = {b"\xff\xd9"}
    while len(found) < count:
        stream = streams[rng.integers(len(streams))]
        place = rng.integers(len(stream))
        found.add(stream[place : place + rng.integers(2, 14)])
    return sorted(part for part in found if len(part) > 1)


def check_lift(ours, spellings, rng, positions):
    """Every token at these positions: open, and leading, where its bytes, one by one, lead."""
    mcus, effects = ours.layout.mcus, ours.automaton.effects
    opened = 0
    for state, left in positions:
        mask = tokens.allowed(ours.tables, state, left, PLENTY)
        assert mask.any()
        for token, spelling in enumerate(spellings):
            here, remaining, possible = state, left, bool(spelling)
            for byte in spelling:
                effect = effects[ours.automaton.effect[here, byte]]
                possible = possible and effect.is_open(remaining, mcus)
                here, remaining = int(ours.automaton.next[here, byte]), remaining - effect.advance
            if token == EOS:
                possible, here = state == automaton.FINISHED, ours.tables.end
            assert mask[token] == possible, (state, left, token, spelling)
            if possible:
                after = tokens.advance(ours.tables, state, left, token)
                assert tuple(map(int, after)) == (here, remaining)
                opened += len(spelling) > 1
    return opened


def positions_of(ours, rng, count):
    """Places that streams pass, those around markers and at both ends included."""
    found, ids = [], write(ours.tables, rng, pace=True, budget=3 * ours.layout.mcus * 40)
    state, left = ours.tables.start, ours.tables.mcus
    for token in ids:
        found.append((state, left))
        state, left = (int(part) for part in tokens.advance(ours.tables, state, left, token))
    chosen = {0, len(found) - 1, len(found) - 2, *rng.integers(0, len(found), count).tolist()}
    around = [i for i, (_, left) in enumerate(found) if i and found[i - 1][1] != left]
    chosen |= set(around[:4] + around[-4:])
    return [found[i] for i in sorted(chosen)]


@pytest.mark.parametrize("subsampling, restart", [("4:2:0", True), ("4:4:4", False), ("gray", True), ("gray", False)])
def test_a_token_is_its_bytes(make, bpe, subsampling, restart):
    codec = jpeg.Codec(JpegConfig(size=SIZE, subsampling=subsampling, restart=restart))
    for spellings in (BYTES, bpe, BYTES + substrings(codec, 60, seed=2)):
        rng = np.random.default_rng(3)
        ours = make(spellings, subsampling=subsampling, restart=restart)[1]
        opened = check_lift(ours, spellings, rng, positions_of(ours, rng, 25))
        assert opened > 20 or spellings is BYTES


def test_sequences_of_the_tokenizer_stay_open(make, learned, bpe):
    """What BPE makes of real pictures is a way through the mask, also from the middle, and ends it."""
    codec, ours = make(bpe)
    streams = [codec.encode(picture) for picture in pictures(SIZE)]
    for stream in streams:
        state, left = ours.tables.start, ours.tables.mcus
        ids = learned.encode(stream, eos=True)
        assert ids[:2].tolist() == [tokenizer.BOS, learned.vocab_size - 1]
        for place, token in enumerate(ids[2:]):
            assert tokens.allowed(ours.tables, state, left, len(ids) - 2 - place)[token]
            state, left = tokens.advance(ours.tables, state, left, token)
        assert (state, left) == (ours.tables.end, 0)
        half = codec.prefix(stream, 0.5)
        state, left = ours.walk(half.tobytes())
        assert left == codec.mcu_count - codec.mcu_count // 2
        rest = write(ours.tables, np.random.default_rng(0), state=state, left=left)
        assert t81.judge(codec.tables, codec.header, half.tobytes() + spell(bpe, rest)) == ""


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    restart=st.booleans(), size=st.integers(1, 60), count=st.integers(2, 40), seed=st.integers(0, 2**32)
)
def test_any_vocabulary_with_all_bytes_spells_streams(folder, restart, size, count, seed):
    rng = np.random.default_rng(seed)
    codec = jpeg.Codec(JpegConfig(size=size, subsampling="gray", restart=restart))
    order = rng.permutation(256).tolist()
    spellings = [b"", b"", b"", *substrings(codec, count, seed), b"", *(bytes([byte]) for byte in order)]
    ours = grammar.make(codec, spellings, EOS, folder=folder)
    check_lift(ours, spellings, rng, positions_of(ours, rng, 3))
    check_least(ours, positions_of(ours, rng, 10))
    least = int(tokens.shortest(ours.tables, ours.tables.start, ours.tables.mcus))
    for budget in (least, least + 1, least + int(rng.integers(500))):
        ids = write(ours.tables, rng, budget, pace=bool(rng.integers(2)))
        assert len(ids) <= budget and ids[-1] == EOS
        assert t81.judge(codec.tables, codec.header, spell(spellings, ids)) == ""


# Budgets


def check_least(ours, positions):
    """Zero at the end, else one more than the least of what can follow: only the true distance is so."""
    tables = ours.tables
    for state, left in positions:
        mask = tokens.allowed(tables, state, left, PLENTY)
        after = tokens.shortest(tables, tables.next[state], left - tables.steps[tables.effect[state]])
        assert tokens.shortest(tables, state, left) == 1 + after[mask].min() > 0
        assert not tokens.allowed(tables, state, left, tokens.shortest(tables, state, left) - 1).any()
    assert tokens.shortest(tables, tables.end, 0) == 0


@layouts
def test_shortest_end_is_exact(make, bpe, subsampling, restart):
    for spellings in (BYTES, bpe):
        ours = make(spellings, subsampling=subsampling, restart=restart)[1]
        check_least(ours, positions_of(ours, np.random.default_rng(4), 60))


@pytest.mark.parametrize("subsampling, restart", [("gray", True), ("gray", False)])
def test_shortest_end_is_exact_in_every_state_and_far_from_the_end(make, bpe, subsampling, restart):
    codec, _ = make(subsampling=subsampling, restart=restart, size=256)
    for spellings in (BYTES, bpe, BYTES + substrings(codec, 50, seed=5)):
        tables = make(spellings, subsampling=subsampling, restart=restart, size=256)[1].tables
        assert len(tables.least) < 200, "no period was found"
        effects = tables.effect
        for left in (0, 1, 2, 7, 40, 333, 1023, 1024):
            complete = (tables.mcus - left) % 8
            fits = (tables.low <= left) & (left <= tables.high) & np.isin(tables.phase, (-1, complete))
            after = tokens.shortest(tables, tables.next, left - tables.steps[effects])
            least = np.minimum(np.where(fits[effects], after, 2**30).min(axis=1) + 1, 2**30)
            least[tables.end] = 0 if left == 0 else 2**30
            finite = least < 2**29
            ours = tokens.shortest(tables, np.arange(len(least)), left)
            np.testing.assert_array_equal(ours[finite], least[finite])
            assert (ours[~finite] >= 2**29).all() and finite.sum() > (5000 if left else 3)


def test_least_budget_of_the_papers_picture(make):
    """59 bytes of header, 256 MCUs of at least 32 bits, 255 restart markers, EOI; then EOS."""
    codec, ours = make(size=256)
    least = int(tokens.shortest(ours.tables, ours.tables.start, 256))
    assert least == 59 + 256 * 4 + 255 * 2 + 2 + 1
    assert not tokens.allowed(ours.tables, ours.tables.start, 256, least - 1).any()
    ids = write(ours.tables, np.random.default_rng(0), least)
    assert len(ids) == least
    assert t81.judge(codec.tables, codec.header, spell(BYTES, ids)) == ""


def test_pace_leaves_something_for_the_last_rows(make):
    codec, ours = make(size=96)
    tables = ours.tables
    least = int(tokens.shortest(tables, tables.start, tables.mcus))
    budget = least + 6 * tables.mcus

    def last_quarter(pace):
        stream = spell(BYTES, write(tables, np.random.default_rng(1), budget, pace))
        assert t81.judge(codec.tables, codec.header, stream) == ""
        markers = [i for i in range(len(codec.header), len(stream) - 1) if stream[i] == 0xFF and stream[i + 1]]
        return np.diff(markers)[-tables.mcus // 4 :].mean()

    assert last_quarter(pace=False) < 6.5, "4 bytes and a marker: blank"
    assert last_quarter(pace=True) > 9


def test_reserve_shares_evenly_and_never_grows():
    held = [tokens.reserve(left, 9, 100) for left in range(9, -1, -1)]
    assert held == [math.floor(100 * (left - 1) / 9) for left in range(9, 0, -1)] + [0]


def test_after_the_end_only_eos(make):
    tables = make()[1].tables
    assert np.flatnonzero(tokens.allowed(tables, tables.end, 0, 1)).tolist() == [EOS]
    assert tokens.advance(tables, tables.end, 0, EOS) == (tables.end, 0)


def test_jax_looks_up_what_numpy_does(make, bpe):
    import jax

    ours = make(bpe)[1]
    tables = jax.device_put(ours.tables)
    rng = np.random.default_rng(6)
    state, left = np.array(positions_of(ours, rng, 40)).T
    budget = rng.integers(1, 300, len(state)) + tokens.shortest(ours.tables, state, left) - 2
    mask = jax.jit(jax.vmap(tokens.allowed, (None, 0, 0, 0)))(tables, state, left, budget)
    expected = np.stack([tokens.allowed(ours.tables, *place) for place in zip(state, left, budget)])
    np.testing.assert_array_equal(mask, expected)
    token = np.array([rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in expected])
    after = jax.jit(jax.vmap(tokens.advance, (None, 0, 0, 0)))(tables, state, left, token)
    np.testing.assert_array_equal(np.array(after), np.array(tokens.advance(ours.tables, state, left, token)))
    held = jax.jit(tokens.reserve)(left, int(left.max()), 1000)
    np.testing.assert_array_equal(held, tokens.reserve(left, int(left.max()), 1000))


def test_few_states(make):
    """Of the bodies; an independent prototype, with seven states more for restart markers, had 44,050 with a header."""
    expected = {"4:2:0": 43984, "4:2:2": 29388, "4:4:4": 22090, "gray": 7236}
    for subsampling, count in expected.items():
        ours = make(subsampling=subsampling)[1]
        assert len(ours.automaton.next) - len(ours.layout.header) == count
        assert ours.tables.next.dtype == np.uint16 and ours.tables.effect.dtype == np.uint8


# Bad input


def test_vocabularies_that_cannot_spell(folder):
    codec = jpeg.Codec(JpegConfig(size=8, subsampling="gray"))
    for spellings, eos, words in (
        ([b"", b"", b"", b"\xff\xd9", b"\xff"], EOS, "no token for the single bytes 00, 01, 02, 03, .*, 07, ..."),
        (BYTES[:3] + BYTES[4:], EOS, "no token for the single bytes 00$"),
        (BYTES, 3, "token 3 cannot mark the end"),
        (BYTES, 300, "token 300 cannot mark the end"),
        (BYTES, -1, "token -1 cannot mark the end"),
    ):
        with pytest.raises(ValueError, match=words):
            grammar.make(codec, spellings, eos, folder=folder)


def test_streams_of_another_form():
    tables = jpeg.Codec(JpegConfig(size=16)).tables
    for options, words in (({"restart_marker_blocks": 2}, "restart interval of 2"), ({"progressive": True}, "SOF0")):
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "JPEG", streamtype=2, **options)
        with pytest.raises(ValueError, match=words):
            read_layout(tables, file.getvalue())


def test_cache_survives_damage(tmp_path, caplog):
    codec = jpeg.Codec(JpegConfig(size=16, subsampling="gray"))
    caplog.set_level(logging.INFO)

    def load():
        caplog.clear()
        return grammar.make(codec, BYTES, EOS, folder=tmp_path / "made" / "here"), caplog.text

    first, log = load()
    assert log.count("built") == 2
    same, log = load()
    assert not log
    files = sorted((tmp_path / "made" / "here").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["bytes", "tokens"], "one file each, and no temporary ones"
    whole = [file.read_bytes() for file in files]
    flipped = bytearray(whole[1])
    flipped[len(flipped) // 2] ^= 1
    cut = [b"", b"\0" * 31, whole[1][:1000], whole[1][:-1]]
    for damage in (*cut, bytes(flipped), whole[1] + b"\0", b"PK\x03\x04" * 99):
        files[1].write_bytes(damage)
        again, log = load()
        assert "is damaged: building it again" in log and log.count("built") == 1
        for ours, theirs in zip(first.tables, again.tables):
            np.testing.assert_array_equal(ours, theirs)
        assert files[1].read_bytes()[:32] == whole[1][:32]
    for ours, theirs in zip(first.tables, same.tables):
        np.testing.assert_array_equal(ours, theirs)
        assert type(ours) is type(theirs)


def test_cache_of_another_version_is_another_file(tmp_path, monkeypatch):
    build = lambda: {"a": np.arange(3)}  # noqa: E731
    cache.cached(tmp_path, "x", "key", build)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    np.testing.assert_array_equal(cache.cached(tmp_path, "x", "key", lambda: {"a": np.arange(4)})["a"], np.arange(4))
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    arrays = cache.cached(tmp_path / "file" / "below", "x", "key", lambda: {"a": np.arange(3)})
    np.testing.assert_array_equal(arrays["a"], np.arange(3))
    assert "cannot keep" in caplog.text


def test_cache_stands_where_the_user_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == pathlib.Path("/somewhere/jpeglm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == pathlib.Path.home() / ".cache" / "jpeglm"
