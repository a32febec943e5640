"""Memory of the input pipeline: that of the batches in flight, and a few numbers and the name of each picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jpeglm_jax.data import flags

PROGRAM = """
import json, resource, sys
from pathlib import Path
from jpeglm_jax.config import Config, DataConfig, JpegConfig
from jpeglm_jax.data.pipeline import Data

folder, index = sys.argv[1:]
data = Data(Config(codec=JpegConfig(size=16), data=DataConfig(path=folder, sequence_length=256, batch_size=8)))
for batch in data.iterate(data.batches(data.train, index)[:200]):
    assert batch["inputs"].all() and not batch["skipped"]
print(json.dumps([len(data.source), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def peak(folder: Path, index: Path) -> tuple[int, int]:
    """Pictures, and the most memory that a process used for 200 batches of them, in KiB."""
    command = [sys.executable, "-c", PROGRAM, folder, index]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_picture_more_costs_its_name_and_a_few_numbers(tmp_path):
    for number in range(8):
        Image.fromarray(flags.flag(number, 48)).save(tmp_path / f"{number}.jpg")
    found = {}
    for count in (1_000, 100_000):
        folder, index = tmp_path / str(count), tmp_path / f"{count}.npz"
        for number in range(count):
            place = folder / f"{number // 1000:03}"
            place.mkdir(parents=True, exist_ok=True)
            os.link(tmp_path / f"{number % 8}.jpg", place / f"{number:06}.jpg")
        for what in ("index and batches", "batches"):  # the first process makes the index
            pictures, found[count, what] = peak(folder, index)
            assert pictures == count
    for what in ("index and batches", "batches"):
        few, many = found[1_000, what], found[100_000, what]
        print(f"{what}: {few / 1024:.1f} MiB for 1,000, {many / 1024:.1f} MiB for 100,000 ({many / few - 1:+.1%})")
        assert 1024 * (many - few) < 200 * 99_000  # bytes; a picture at 16x16 alone has 768
