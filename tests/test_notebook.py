"""The notebook runs from top to bottom on a run that the test makes."""

import dataclasses
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny
from nbclient import NotebookClient
from PIL import Image

from jpeglm_jax.data import flags
from jpeglm_jax.hf import export_run
from jpeglm_jax.train import train

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "sample.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(notebook, tag: str):
    (found,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return found


def test_the_notebook_is_valid_and_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_samples_from_nothing_and_from_a_picture(notebook, tmp_path):
    config = tiny.config(tmp_path / "run")
    # Rows, because chunks of the 50,000 flags would have them all measured first.
    rows, step = dataclasses.replace(config.data, packing="rows"), dataclasses.replace(config.train, steps=1)
    train(dataclasses.replace(config, data=rows, train=step))
    export_run(str(tmp_path / "run" / "checkpoints" / "1"), str(tmp_path / "weights"), "bfloat16")
    Image.fromarray(flags.flag(3, 48)).save(tmp_path / "flag.png")

    notebook.cells.remove(cell(notebook, "install"))
    parameters = cell(notebook, "parameters")
    names = {line.split(" = ")[0] for line in parameters.source.splitlines() if " = " in line}
    values = {
        "RUN": str(tmp_path / "imported"),
        "SOURCE": str(tmp_path / "weights"),
        "OUT": str(tmp_path / "out"),
        "COUNT": 2,
        "SEED": 5,
        "MAX_TOKENS": 500,
        "TEMPERATURE": 0.8,
        "TOP_P": 0.9,
        "PROMPT": str(tmp_path / "flag.png"),
        "RATIO": 0.25,
    }
    assert names == values.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    for kind in ("nothing", "completed"):
        out = tmp_path / "out" / kind
        names = sorted(path.name for path in out.iterdir())
        assert names == ["sample_0005.jpg", "sample_0006.jpg", "samples.png", "writing.gif"]
        for name in names:
            with Image.open(out / name) as picture:
                assert np.asarray(picture).size
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3  # two that were live, and the sheet
