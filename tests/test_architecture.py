"""Imports go one way: `ALLOWED` says what each part of the package may import of the others."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import jpeglm_jax

ROOT = Path(jpeglm_jax.__file__).parent

# Below each part, in the order in which data flows, all that it may import. What is not listed may not be imported.
ALLOWED = {
    # from pictures to batches of tokens: never JAX
    "config": "",
    "files": "",
    "codecs": "config",
    "tokenizer": "config files codecs",
    "grammar": "config codecs",
    "data": "config files codecs tokenizer",
    # the model: never a codec, a tokenizer or data
    "sharding": "config",
    "distributed": "sharding",
    "attention": "config sharding",
    "model": "config sharding attention",
    # leaves
    "tables": "",
    "loss": "config sharding tokenizer",
    "optim": "config",
    "metrics": "config files loss optim",
    "checkpoints": "config",
    "runs": "config files sharding model tokenizer checkpoints",
    # what is done with them
    "hf": "config codecs tokenizer sharding model checkpoints runs",
    "sampling": "config codecs grammar tokenizer data sharding attention model runs",
    "evaluation": "config codecs grammar tokenizer data sharding model loss metrics runs sampling",
    "train": "config codecs grammar tokenizer data sharding distributed model loss optim metrics checkpoints runs sampling "
    "evaluation",
    "benchmarks": "config codecs grammar tokenizer data sharding attention model metrics runs hf sampling evaluation train",
    "preflight": "config codecs grammar tokenizer data sharding model metrics sampling train benchmarks",
    "cli": "config codecs grammar tokenizer data distributed model tables runs hf sampling evaluation train "
    "benchmarks preflight",
}

WITHOUT_JAX = ("config", "files", "codecs", "tokenizer", "grammar", "tables")
"""Not even through other libraries; `data` imports Grain, which imports JAX."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module's syntax by its dotted name below the package; packages end in `__init__`."""
    paths = ROOT.rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imports(module: ast.Module) -> set[str]:
    """Dotted names that a module imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def edges() -> set[tuple[str, str]]:
    """Pairs of parts of the package of which the first imports the second."""
    return {
        (name.split(".")[0], imported.split(".")[1])
        for name, module in modules().items()
        for imported in imports(module)
        if imported.startswith("jpeglm_jax.")
    }


def test_every_part_stands_in_the_table():
    assert {name.split(".")[0] for name in modules()} - {"__init__"} == ALLOWED.keys()


def test_the_table_goes_one_way():
    order = list(ALLOWED)
    for place, part in enumerate(order):
        assert set(ALLOWED[part].split()) <= set(order[:place]), part


def test_imports_follow_the_table():
    against = {f"{part} -> {other}" for part, other in edges() if other != part and other not in ALLOWED[part].split()}
    assert not against


def test_only_checkpoints_imports_orbax():
    found = {name for name, module in modules().items() for i in imports(module) if i.startswith("orbax")}
    assert found == {"checkpoints"}


def test_the_config_needs_only_the_standard_library():
    assert {name.split(".")[0] for name in imports(modules()["config"])} <= sys.stdlib_module_names


def test_data_uses_no_jax():
    data = {name: imports(module) for name, module in modules().items() if name.startswith("data")}
    assert not {name for name, imported in data.items() for i in imported if i.split(".")[0] == "jax"}


@pytest.mark.parametrize("part", WITHOUT_JAX)
def test_what_handles_files_never_loads_jax(part):
    names = [f"jpeglm_jax.{name}".removesuffix(".__init__") for name in modules() if name.split(".")[0] == part]
    program = "import sys, importlib\nfor x in sys.argv[1:]: importlib.import_module(x)\nprint('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_files_are_named_for_what_they_hold_and_the_model_is_short():
    assert not list(ROOT.rglob("utils.py"))
    assert len((ROOT / "model.py").read_text().splitlines()) < 350
