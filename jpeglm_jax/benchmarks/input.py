"""Images a second of the input pipeline on one core: ours, the published steps, and Pillow alone."""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jpeglm_jax import tokenizer
from jpeglm_jax.config import Config, DataConfig, JpegConfig
from jpeglm_jax.data import pictures as reading
from jpeglm_jax.data.pipeline import Data, learn_tokenizer
from jpeglm_jax.data.sources import open_source

VOCABULARY = 320
"""Of the BPE that is learned where the config names no tokenizer (paper, section 3.2)."""

Pass = Callable[[], float]
"""One pass over the pictures; returns how many came out at its end."""


def bench_input(config: Config, pictures: int, rounds: int) -> dict[str, Any]:
    """Runs each pipeline once a round, in turn, and gives medians over the rounds.

    The pictures are photos of 500x375 pixels in JPEG files of quality 90 where the config names built-in ones, and else
    the first of its source. They become what `config.codec` says. Lengths are measured and tokenizers learned before
    any clock starts.

      pillow     decode, centre square, resize, JPEG encode, and nothing else
      ours       files in a folder to batches of chunks: the Grain chain of a run with one thread
      published  Pillow's part, then bytes to hexadecimal to Braille text to transformers' LlamaTokenizer; no packing

    Args:
      pictures: that a pass reads; ours reads whole batches, so somewhat more.

    Returns:
      Images a second, ratios of medians, and what was measured on.

    Raises:
      ValueError: no readable pictures, or no photos because neither scikit-image nor scikit-learn is installed.
    """
    if pictures < 2 or rounds < 1:
        raise ValueError(f"at least 2 pictures and 1 round are needed, not {pictures} and {rounds}")
    with tempfile.TemporaryDirectory() as scratch, _one_core() as core:
        scratch = Path(scratch)
        files, plain_config, bpe_config = prepare(config, picture_files(config), pictures, scratch)
        plain, plain_tokens = _ours(plain_config, scratch / "plain.npz", len(files))
        bpe, bpe_tokens = _ours(bpe_config, scratch / "bpe.npz", len(files))
        passes = {"pillow": lambda: _pillow(files, config.codec), "ours, BPE": bpe, "ours, bytes": plain}
        published, described = _published(files, config.codec, Path(bpe_config.tokenizer))
        if published is not None:
            passes["published"] = published
        speeds = _in_turn(passes, rounds)
    rows: dict[str, Any] = {
        "pictures": len(files),
        "bytes a picture": plain_tokens - 2,  # without BOS and EOS
        "BPE tokens a picture": bpe_tokens,
        "core": core,
    }
    rows |= {f"{name}, images/s": speed for name, speed in speeds.items()}
    rows |= {"published tokenizer": described}
    for name in ("ours, BPE", "ours, bytes"):
        rows[f"pillow / {name} (aim: at most 1.3)"] = speeds["pillow"] / speeds[name]
    if published is not None:
        rows["ours, BPE / published (aim: at least 4)"] = speeds["ours, BPE"] / speeds["published"]
    return rows


def prepare(config: Config, source: Iterable[bytes], pictures: int, scratch: Path) -> tuple[list[bytes], Config, Config]:
    """Pictures in a folder under `scratch`, and configs that read them there: plain bytes, and BPE.

    BPE is that of the config, or, where its tokenizer is not to be had, learned from the pictures.

    Raises:
      ValueError: fewer than two pictures.
    """
    files = list(itertools.islice(source, pictures))
    if len(files) < 2:
        raise ValueError(f"{config.data.path} has {len(files)} readable pictures; at least 2 are needed")
    folder, model = scratch / "pictures", scratch / "tokenizer.model"
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number:06}.jpg").write_bytes(file)  # readers go by the content, not by the name
    data = dataclasses.replace(
        config.data,
        path=str(folder),
        packing="chunks",
        sequence_length=config.data.sequence_length or DataConfig.sequence_length,
        holdout=1,
        threads=1,
        workers=0,
    )
    plain = dataclasses.replace(config, tokenizer="", data=data)
    if config.tokenizer and Path(config.tokenizer).exists():
        tokenizer.load(config.tokenizer, 256).save(model)
    else:
        learn_tokenizer(plain, len(files), config.model.vocab_size or VOCABULARY, model)
    return files, plain, dataclasses.replace(plain, tokenizer=str(model))


def one_core(config: Config, pictures: int) -> tuple[float, float]:
    """Pictures a second that our pipeline makes ready on one core, and the mean tokens of one; `config` as of `prepare`."""
    run, tokens = _ours(config, Path(config.data.path).with_name("lengths.npz"), pictures)
    with _one_core():
        return _in_turn({"ours": run}, 1)["ours"], tokens


def _in_turn(passes: dict[str, Pass], rounds: int) -> dict[str, float]:
    """Images a second of each pass, the median over rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(-1, rounds):  # the first warms up
        for name, run in passes.items():
            start = time.perf_counter()
            images = run()
            if number >= 0:
                speeds[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def _pillow(files: list[bytes], codec: JpegConfig) -> int:
    for file in files:
        _encode(file, codec)
    return len(files)


def _encode(file: bytes, codec: JpegConfig) -> bytes:
    """The bare calls of Pillow that `pictures.load` and the codec make."""
    image = Image.open(io.BytesIO(file))
    image.draft(None, (2 * codec.size, 2 * codec.size))
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((codec.size, codec.size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    options = {"quality": codec.quality, "streamtype": 2, "restart_marker_blocks": int(codec.restart)}
    if codec.subsampling == "gray":
        image = image.convert("L")
    else:
        options["subsampling"] = codec.subsampling
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _ours(config: Config, lengths_path: Path, pictures: int) -> tuple[Pass, float]:
    """A pass over at least `pictures` pictures in whole batches, and the mean tokens of a picture."""
    data = Data(config)
    batches = data.batches(data.train, lengths_path)
    tokens = float(data.lengths(lengths_path).mean())
    count = math.ceil(pictures * tokens / (config.data.batch_size * config.data.sequence_length))

    def run() -> float:
        # A slice ends: no thread makes batches ahead of time while the next pipeline has its turn.
        return sum(batch["targets"].size for batch in data.iterate(batches[:count])) / tokens

    return run, tokens


def _published(files: list[bytes], codec: JpegConfig, model: Path) -> tuple[Pass | None, str]:
    """The steps of the published preprocess.py (repository xhan77/jpeg-lm), and which tokenizer they ran with."""
    try:
        import transformers
    except ImportError:
        return None, "not installed: pip install 'jpeglm_jax[hf]'"
    llama = transformers.LlamaTokenizer.from_pretrained(model.parent, use_fast=False, add_bos_token=True)

    def run() -> int:
        for file in files:
            hexadecimal = _encode(file, codec).hex()
            numbers = [int(byte) for byte in bytearray.fromhex(hexadecimal)]
            llama("".join([chr(number + 10240) for number in numbers]), add_special_tokens=False)
        return len(files)

    # transformers 5 has no slow one any more, which the published code asks for and which takes 4 times as long.
    kind = "fast" if llama.is_fast else "slow, as published"
    return run, f"{type(llama).__name__} of transformers {transformers.__version__}, {kind}"


def picture_files(config: Config) -> Iterator[bytes]:
    """Picture files that can be read, in the order of the source."""
    if config.data.path.startswith("builtin:"):
        yield from map(file, _crops(_photos()))
    else:
        source = open_source(config.data.path, config.data.split)
        for index in range(len(source)):
            try:
                data = source[index]
                reading.load(data, config.codec.size)
            except reading.BadPicture:
                continue
            yield file(Image.fromarray(data)) if isinstance(data, np.ndarray) else data


def file(image: Image.Image) -> bytes:
    """A JPEG file of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _crops(photos: list[Image.Image]) -> Iterator[Image.Image]:
    """Photos of 500x375 pixels without end, all different."""
    random = np.random.default_rng(0)
    for photo in itertools.cycle(photos):
        width = min(photo.width, photo.height * 4 / 3) * random.uniform(0.8, 1)
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - width * 3 / 4)
        yield photo.resize((500, 375), Image.Resampling.LANCZOS, box=(left, top, left + width, top + width * 3 / 4))


def _photos() -> list[Image.Image]:
    photos: list[np.ndarray] = []
    with contextlib.suppress(ImportError):
        from skimage import data

        photos += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    with contextlib.suppress(ImportError):
        from sklearn.datasets import load_sample_images

        photos += load_sample_images().images
    if not photos:
        raise ValueError("no photos: pip install scikit-image or scikit-learn, or give a folder with --data.path")
    return [Image.fromarray(photo) for photo in photos]


@contextlib.contextmanager
def _one_core() -> Iterator[str]:
    """Keeps this thread, and those that it starts, on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield "any: this system cannot keep a process on one"
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield f"one of {len(allowed)}"
    finally:
        os.sched_setaffinity(0, allowed)
