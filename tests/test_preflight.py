"""Slices by name, figures read from real TPU programs, and `jpeglm preflight` as it is typed.

What compiles uses the real TPU compiler, libtpu, on a machine without a TPU; `launch/test.sh` fetches it.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest

from jpeglm_jax import cli
from jpeglm_jax.config import Config, DataConfig, JpegConfig, MeshConfig, ModelConfig
from jpeglm_jax.preflight import programs, report, slices

CONFIGS = Path(__file__).parents[1] / "configs"

has_compiler = pytest.mark.skipif(
    not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None,
    reason="no libtpu: launch/test.sh fetches it",
)

SMALL = Config(
    codec=JpegConfig(size=32),
    data=DataConfig(packing="chunks", sequence_length=256, batch_size=16),
    model=ModelConfig(width=256, layers=3, heads=2, kv_heads=2, head_dim=128, mlp_width=512),
)


@pytest.mark.parametrize(
    "name, shape, chips",
    [("v5e-64", "8x8", 64), ("v5litepod-64", "8x8", 64), ("v5p-64", "2x4x4", 32), ("v6e-256", "16x16", 256)]
    + [("v5e:4x8", "4x8", 32), ("2xv5e-64", "8x8", 128)],
)
def test_slices_by_the_names_of_google_cloud(name, shape, chips):
    found = slices.topology(name)
    assert (found.shape, found.chips) == (shape, chips)


@pytest.mark.parametrize("name", ["v5e-63", "v7-8", "v5e", "", "0xv5e-64", "v5e:3x3", "x"])
def test_an_unknown_slice_is_named_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"no TPU slice '{name}'; there are: v5e-4, -8, .*v6e-4.*v5p-8"):
        slices.topology(name)


def test_collectives_and_cycles_are_counted_as_often_as_they_run():
    text = """
%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[2,4] {
  %r = bf16[8,4]{1,0} all-reduce(%p), channel_id=3, to_apply=%add
}

%inner (p: s32[]) -> s32[] {
  %g = bf16[1048576,64]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={0}
  %f = f32[2]{0} fusion(%g), kind=kLoop, calls=%again, backend_config={"estimated_cycles":"10"}
  %s = bf16[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}

%again (p: s32[]) -> s32[] {
  %g2 = bf16[1048576,64]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={0}
}

%outer (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%c, body=%inner
  %x = f32[2]{0} fusion(%w), kind=kLoop, backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %w2 = s32[] while(%p), condition=%c, body=%outer
  %y = f32[2]{0} fusion(%w2), kind=kLoop, backend_config={"estimated_cycles":"7"}
}
"""
    cycles, collectives = programs.cycles_and_collectives(text, layers=3, parts=2)
    assert cycles == 7 + 2 * (1000 + 3 * 10)
    assert collectives == {"all-gather": 6 * 0.125, "reduce-scatter": 6 * 64 / 2**30}


@pytest.mark.parametrize(
    "message, excess",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 32.95G of 15.75G hbm. Exceeded by 17.20G.", 17.2),
        ("RESOURCE_EXHAUSTED: temporaries (1.50T) exceeds available HBM (31.25G).", 1504.75),
        ("INTERNAL: something else", None),
    ],
)
def test_refusals_say_by_how_much(message, excess):
    assert programs.excess(RuntimeError(message)) == (excess and pytest.approx(excess))


def test_without_a_compiler_preflight_says_how_to_get_one(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jpeglm_jax\[preflight\]'"):
        report.preflight(SMALL, ["v5e-4"], 0.5)


def run(tmp_path, *arguments):
    path = tmp_path / "config.py"
    path.write_text(f"from jpeglm_jax.config import *\nconfig = {SMALL!r}\n")
    cli.main(["preflight", str(path), "--json", str(tmp_path / "table.json"), *arguments])
    return json.loads((tmp_path / "table.json").read_text())


@has_compiler
def test_a_small_run_is_compiled_for_a_slice(tmp_path, capsys):
    table = run(tmp_path, "--topology", "v5e-4", "--optim.rows-per-device", "2")
    rows = table["v5e-4"]
    assert rows["training fits"].startswith("yes") and rows["sampling fits"].startswith("yes")
    assert rows["rows a chip x parts"] == "2 x 2"
    assert rows["compiler's cycles a step, 1e9"] > 0 and 0 < rows["MFU at most"] < 1
    # Weights of every layer are gathered for use, and gradients reduced to the shards: all but the small ones are not
    # all-reduced.
    weights = 2 * 3 * (4 * 256 * 256 + 3 * 256 * 512) / 2**30  # bfloat16
    assert rows["all-gather, GiB a chip"] > weights
    assert rows["reduce-scatter, GiB a chip"] > rows["all-reduce, GiB a chip"]
    shown = capsys.readouterr()
    assert "MFU at most" in shown.out and "hostname" not in shown.err


@has_compiler
def test_a_run_that_cannot_fit_says_so_and_exits_with_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--topology", "v5e-4", "--model.width", "16384", "--model.mlp-width", "65536", "--model.layers", "64")
    assert stop.value.code == 1
    assert "NO, " in capsys.readouterr().out


@has_compiler
def test_slices_are_joined_by_whole_copies_of_the_model(tmp_path):
    joined = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, vocab_size=259, attention="splash"))
    two = dataclasses.replace(joined, mesh=MeshConfig(data=2))
    one, both = (
        report.compile_program(config, slices.topology(name), "train") for config, name in ((joined, "v5e-4"), (two, "2xv5e-4"))
    )
    assert both["state"] == one["state"]
    with pytest.raises(ValueError, match=r"mesh.data \(1\) must be a multiple of the 2 slices"):
        report.compile_program(joined, slices.topology("2xv5e-4"), "train")


@has_compiler
def test_a_batch_that_does_not_divide_names_the_slice_and_the_numbers(tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--topology", "v5e-8", "--data.batch-size", "12")
    assert "v5e-8: data.batch_size (12) must be a multiple of the 8 devices" in stop.value.code


@pytest.mark.slow
@has_compiler
@pytest.mark.parametrize(
    "name, limit, peak, cycles",
    # MaxText 0.2.5 with full remat, one row a chip, compiled with the same libtpu.
    [("v5e-64", 40, 6.678, 6.713e9), ("v5e-256", 32, 5.406, 6.685e9), ("v6e-64", 20, 6.677, 2.354e9)],
)
def test_the_7b_takes_less_than_the_reference(name, limit, peak, cycles):
    config = cli.load_config(str(CONFIGS / "jpeglm_7b.py"))
    where = slices.topology(name)
    option = f"xla_tpu_scheduler_percent_shared_memory_limit={limit}"
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=where.chips),
        model=dataclasses.replace(config.model, attention="splash", remat="full"),
        train=dataclasses.replace(config.train, compiler_options=option),
    )
    figures = report.compile_program(config, where, "train")
    assert figures["peak"] <= peak
    assert figures["cycles"] <= cycles
