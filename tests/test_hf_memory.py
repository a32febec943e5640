"""A checkpoint of 7B goes in and out on a machine that could not hold two. Takes 50 GB of disk and up to 20 GiB of memory."""

import json
import shutil
import socket
from pathlib import Path

import measured
import numpy as np
import pytest
from skimage import data

from jpeglm_jax import hf, tokenizer
from jpeglm_jax.codecs.jpeg import Codec
from jpeglm_jax.config import Config, JpegConfig, ModelConfig

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

CLI = ["-c", "import sys; from jpeglm_jax.cli import main; main(sys.argv[1:])"]


def published(folder: Path) -> dict[str, np.ndarray]:
    """A directory like the published one: one pytorch_model.bin of random float16. Returns its tensors."""
    model = ModelConfig(vocab_size=320)
    noise = np.random.default_rng(0).standard_normal(2**26, np.float32).astype(np.float16)
    tensors = {}
    for number, (name, tensor) in enumerate(hf._tensors(model).items()):
        size = int(np.prod(tensor.shape))
        tensors[name] = noise[977 * number :][:size].reshape(tensor.shape)
    folder.mkdir()
    # Each a storage of its own, though their memory overlaps.
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
    codec = Codec(JpegConfig())
    streams = [codec.encode(np.ascontiguousarray(getattr(data, name)()[:256, :256])) for name in ("astronaut", "coffee")]
    tokenizer.train_bpe(streams, 320, folder / "tokenizer.model")
    settings = hf._to_hf(Config(model=model), "float16")
    del settings[hf.SETTINGS]
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_seven_billion_parameters_go_in_and_out_within_24_gigabytes(tmp_path):
    tensors = published(tmp_path / "hf")
    try:
        (importing,) = measured.run([*CLI, "import", tmp_path / "hf", tmp_path / "run"])
        shutil.rmtree(tmp_path / "hf")
        beside = Path(__file__).with_name
        (saving,) = measured.run([beside("save_on_eight.py"), tmp_path / "run", tmp_path / "eight"])
        shutil.rmtree(tmp_path / "run")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [beside("export_in_processes.py"), tmp_path / "eight", tmp_path / "back", hf.FILE_BYTES, port]
        exporting = measured.run([*command, 0], [*command, 1], JAX_NUM_CPU_DEVICES="1")
        print(f"GiB: import {importing:.2f}, load and save on eight {saving:.2f}, export {exporting}")
        found = {}
        for path in (tmp_path / "back").glob("*.safetensors"):
            with safetensors.safe_open(path, framework="np") as file:
                for name in file.keys():
                    assert np.array_equal(file.get_tensor(name), tensors[name]), name
                    found[name] = path.name
        assert found.keys() == tensors.keys()
        assert importing < 7 and saving < 20 and max(exporting) < 4
    finally:
        for name in ("hf", "run", "eight", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
