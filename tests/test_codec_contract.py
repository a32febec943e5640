"""What every codec promises, whichever it is."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jpeglm_jax import codecs, config
from jpeglm_jax.data import flags

SIZE = 48


@pytest.fixture(params=codecs.names(), scope="module")
def codec(request):
    [settings_of_codec] = [
        cls
        for cls in vars(config).values()
        if isinstance(cls, type) and getattr(cls, "name", None) == request.param and hasattr(cls, "size")
    ]
    return codecs.make(settings_of_codec(size=SIZE))


@pytest.fixture
def symbols(codec):
    return codec.encode(flags.flag(2, SIZE))


def test_a_picture_survives_nearly_and_nothing_is_lost(codec, symbols):
    assert symbols.ndim == 1 and np.issubdtype(symbols.dtype, np.unsignedinteger)
    assert symbols.max() < codec.alphabet_size
    decoded = codec.decode(symbols)
    assert decoded.lost == ""
    assert decoded.picture.shape == (SIZE, SIZE, 3) and decoded.picture.dtype == np.uint8
    assert np.abs(decoded.picture.astype(int) - flags.flag(2, SIZE)).mean() < 16


def test_every_prefix_is_a_beginning_and_grows_with_the_ratio(codec, symbols):
    cuts = [codec.prefix(symbols, ratio) for ratio in (0, 0.25, 0.5, 1)]
    assert all(np.array_equal(cut, symbols[: len(cut)]) for cut in cuts)
    assert sorted({len(cut) for cut in cuts}) == [len(cut) for cut in cuts]
    assert len(cuts[-1]) == len(symbols)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(codec, symbols, ratio):
    with pytest.raises(ValueError, match="ratio must be from 0 to 1"):
        codec.prefix(symbols, ratio)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_symbols_decode_to_a_picture(codec, data):
    symbols = data.draw(hnp.arrays(np.int32, st.integers(0, 300), elements=st.integers(0, codec.alphabet_size - 1)))
    decoded = codec.decode(symbols)
    assert decoded.picture.shape == (SIZE, SIZE, 3) and decoded.picture.dtype == np.uint8
    assert decoded.lost


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_decodes_to_a_picture(codec, data):
    symbols = codec.encode(flags.flag(2, SIZE)).copy()
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(symbols) - 1), st.integers(0, codec.alphabet_size - 1)), max_size=20)
    ):
        symbols[place] = value
    symbols = symbols[: data.draw(st.integers(0, len(symbols)))]
    assert codec.decode(symbols).picture.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("shape, dtype", [((48, 48), "uint8"), ((48, 48, 3), "float32"), ((64, 64, 3), "uint8")])
def test_another_shape_or_dtype_is_refused(codec, shape, dtype):
    with pytest.raises(ValueError, match=rf"uint8 \({SIZE}, {SIZE}, 3\)"):
        codec.encode(np.zeros(shape, dtype))


def test_a_codec_can_be_sent_to_another_process(codec, symbols):
    copy = pickle.loads(pickle.dumps(codec))
    assert np.array_equal(copy.encode(flags.flag(2, SIZE)), symbols)
    assert copy.describe() == codec.describe() and "\n" not in codec.describe()


def test_no_codec_imports_jax():
    program = (
        "import sys; from jpeglm_jax import codecs, config; import importlib;"
        "[importlib.import_module(f'jpeglm_jax.codecs.{name}') for name in codecs.names()];"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_unknown_codec_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="jpeg"):
        codecs.make(type("Config", (), {"name": "gif"}))
