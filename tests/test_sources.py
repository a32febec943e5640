"""Folders, ArrayRecord, TFDS without TensorFlow, invented flags."""

import io
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from jpeglm_jax.codecs.jpeg import Codec
from jpeglm_jax.config import JpegConfig
from jpeglm_jax.data import flags, pictures
from jpeglm_jax.data.pictures import BadPicture
from jpeglm_jax.data.sources import open_source


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (20, 30), shade).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    pictures = ["b.jpg", "a.JPEG", "deep/er/c.PnG", "ünïcode/d e.webp"]
    for name in pictures + [".hidden.jpg", ".cache/x.jpg", "notes.txt", "jpg", "z/.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_a_folder_gives_its_pictures_in_the_order_of_their_names(folder):
    source = open_source(str(folder), "train")
    names = ["a.JPEG", "b.jpg", "deep/er/c.PnG", "ünïcode/d e.webp"]
    assert [source.name(index) for index in range(len(source))] == names
    assert [source[index].decode() for index in range(len(source))] == names
    with pytest.raises(IndexError):
        source[4]


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write(b"latin")
    source = open_source(str(tmp_path), "train")
    assert source[0] == b"latin" and len(source.fingerprint()) == 64


def test_the_fingerprint_of_a_folder_follows_its_names(folder):
    def fingerprint():
        return open_source(str(folder), "train").fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (folder / "notes.txt").write_text("another note")
    assert fingerprint() == seen[0]
    (folder / "b.jpg").write_bytes(b"damaged")
    assert fingerprint() == seen[0]
    (folder / "b.jpg").rename(folder / "bb.jpg")
    seen.append(fingerprint())
    (folder / "bb.jpg").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 3


def test_an_unreadable_file_is_a_bad_picture(folder):
    source = open_source(str(folder), "train")
    (folder / "a.JPEG").unlink()
    (folder / "a.JPEG").mkdir()
    with pytest.raises(BadPicture, match="^cannot be read: Is a directory$"):
        source[0]


def test_many_names_take_little_memory(tmp_path):
    for index in range(2000):
        (tmp_path / f"{index:06}.jpg").touch()
    source = open_source(str(tmp_path), "train")
    assert len(pickle.dumps(source)) < 2000 * (len("000000.jpg") + 8) + 1000


@pytest.fixture
def records(tmp_path):
    for part, shades in enumerate([(0, 50), (100, 150, 200)]):
        writer = ArrayRecordWriter(str(tmp_path / f"set.array_record-{part:05}-of-00002"), "group_size:1")
        for shade in shades:
            writer.write(jpeg(shade))
        writer.close()
    return tmp_path


def test_array_records_are_read_across_files(records):
    source = open_source(f"{records}/set.array_record*", "train")
    assert [source[index] for index in range(len(source))] == [jpeg(shade) for shade in (0, 50, 100, 150, 200)]
    assert "3" in source.name(3)
    part = open_source(f"{records}/set.array_record-00001-of-00002", "train")
    assert len(part) == 3
    assert part.fingerprint() != source.fingerprint() == open_source(f"{records}/set.array_record*", "").fingerprint()


def test_a_damaged_record_is_a_bad_picture(records):
    path = next(iter(sorted(records.glob("*00000-of*"))))
    source = open_source(f"{records}/set.array_record*", "train")
    data = path.read_bytes()
    first = data.index(jpeg(0)[:40]) if jpeg(0)[:40] in data else 64 * 1024
    path.write_bytes(data[: first // 2] + bytes(64) + data[first // 2 + 64 :])
    with pytest.raises(BadPicture, match="cannot be read"):
        for index in range(len(source)):
            source[index]


def test_a_file_that_is_no_array_record_is_refused(tmp_path):
    (tmp_path / "x.array_record").write_bytes(b"junk")
    with pytest.raises(ValueError, match="x.array_record: not ArrayRecord files"):
        open_source(str(tmp_path / "x.array_record"), "train")


MAKE_TFDS = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds

class Shades(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {sys.argv[2]: tfds.features.Image(), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, data in enumerate(sys.argv[4:]):
            yield index, {sys.argv[2]: io.BytesIO(bytes.fromhex(data)), "label": index}

Shades(data_dir=sys.argv[1], file_format=sys.argv[3]).download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
)
assert "tensorflow" not in sys.modules
"""


def make_tfds(place, feature: str) -> None:
    shades = [jpeg(shade).hex() for shade in (0, 100, 200)]
    arguments = [str(place), feature, "array_record", *shades]
    subprocess.run([sys.executable, "-c", MAKE_TFDS, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def tfds_place(tmp_path_factory):
    """Made by another process, as users find it: only files, no class."""
    place = tmp_path_factory.mktemp("tfds")
    make_tfds(place, "image")
    return place


def test_tfds_gives_the_files_as_they_were_without_tensorflow(tfds_place, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_place))
    source = open_source("tfds:shades", "train")
    assert sorted(source[index] for index in range(len(source))) == sorted(jpeg(shade) for shade in (0, 100, 200))
    part = open_source("tfds:shades", "train[:2]")
    assert len(part) == 2 and part.fingerprint() != source.fingerprint()
    assert "shades" in source.name(1) and "train" in source.name(1)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "path, split, message",
    [
        ("tfds:shades", "test", "no split 'test'"),
        ("tfds:no_such_set", "train", "no TFDS data set 'no_such_set'"),
        ("tfds:mnist", "train", "not prepared .* as ArrayRecord"),
        ("tfds:", "train", "no TFDS data set ''"),
    ],
)
def test_tfds_says_what_is_missing(tfds_place, monkeypatch, path, split, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_place))
    with pytest.raises(ValueError, match=message) as error:
        open_source(path, split)
    assert "\n" not in str(error.value)


def test_tfds_without_pictures_is_refused(tmp_path, monkeypatch):
    make_tfds(tmp_path, "photograph")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="no feature `image`, only label, photograph"):
        open_source("tfds:shades", "train")


def first(source) -> bytes:
    return np.asarray(source[0]).tobytes()


def test_every_source_works_in_a_worker_process(folder, records, tfds_place, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_place))
    paths = [str(folder), f"{records}/*.array_record*", "tfds:shades", "builtin:flags"]
    sources = [open_source(path, "train") for path in paths]
    expected = [first(source) for source in sources]  # also opens files, which must not travel
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(first, sources) == expected


@pytest.mark.parametrize(
    "path, message",
    [
        ("builtin:photos", "builtin:flags"),
        ("no/such/folder", "no folder no/such/folder"),
        ("no/such/*.array_record", "no file matches"),
    ],
)
def test_a_path_to_nothing_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        open_source(path, "train")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="no pictures in .*jpg"):
        open_source(str(tmp_path), "train")


def test_flags_are_the_same_everywhere():
    """The first 16 flags, by a fingerprint that a change of the generator must change on purpose."""
    source = open_source("builtin:flags", "train")
    assert len(source) == 50_000
    assert source[7].shape == (48, 48, 3) and source[7].dtype == np.uint8
    assert np.array_equal(source[np.int64(7)], flags.flag(7, 48))
    assert source.fingerprint() == "a5a7ed7c5f73ce2ecade64037ad151690975913c8381575fe9525c932e790e3e"


def test_flags_differ_and_are_plain():
    drawn = [flags.flag(index, 48) for index in range(1000)]
    assert len({flag.tobytes() for flag in drawn}) > 800
    palette = set(flags.COLORS.values())
    for flag in drawn:
        assert 2 <= len(colors := {tuple(color) for color in flag.reshape(-1, 3).tolist()}) <= 6 and colors <= palette
    assert flags.flag(100_000, 48).shape == (48, 48, 3)


@pytest.mark.parametrize("size", [48, 64])
def test_edges_lie_on_the_grid(size):
    """Apart from emblems and the upright of a Nordic cross: most cells are of one colour."""
    plain = []
    for index in range(300):
        cells = flags.flag(index, size).reshape(size // 16, 16, size // 16, 16, 3)
        plain.append((cells == cells[:, :1, :, :1]).all(axis=(1, 3, 4)))
    assert np.mean(plain) > 0.85


def test_equal_cells_are_equal_bytes():
    codec = Codec(JpegConfig(size=48, restart=True))
    intervals = set()
    for index in range(500):
        stream = codec.encode(pictures.load(flags.flag(index, 48), 48))
        ends = [len(codec.prefix(stream, count / 9)) for count in range(10)]
        intervals |= {stream[start : end - 2].tobytes() for start, end in zip(ends, ends[1:])}
    assert len(intervals) < 320  # of 4,500 MCUs


@pytest.mark.parametrize("size", [3, 16, 40, 100, 256])
def test_flags_come_in_any_size(size):
    for index in range(30):
        assert flags.flag(index, size).shape == (size, size, 3)
