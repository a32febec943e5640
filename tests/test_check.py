"""`jpeglm check`: a line for each file, and the exit status."""

import numpy as np
import pytest
from PIL import Image
from test_grammar import photos
from tiny import config

from jpeglm_jax import codecs
from jpeglm_jax import config as configs
from jpeglm_jax.cli import main
from jpeglm_jax.config import JpegConfig


@pytest.fixture
def files(tmp_path):
    """A valid file, its stream, a wrong padding bit, a file cut off, a picture of another size, and no pictures."""
    codec = codecs.make(JpegConfig(size=48))
    stream = codec.encode(photos(48)[0])
    wrong = stream.copy()
    wrong[stream.tobytes().index(b"\xff\xd2") - 1] &= 0xFE
    contents = {
        "valid.jpg": codec.to_file(stream),
        "stream": stream.tobytes(),
        "padding.jpg": codec.to_file(wrong),
        "cut.jpg": codec.to_file(stream)[:-40],
        "text.jpg": b"hello",
        "empty.jpg": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "other.jpg", quality=25)
    return tmp_path


def check(capsys, *arguments) -> tuple[list[str], int]:
    """The lines, and the exit status."""
    try:
        main(["check", *map(str, arguments)])
        status = 0
    except SystemExit as exit:
        status = exit.code
    return capsys.readouterr().out.splitlines(), status


def test_a_line_for_each_file(files, capsys):
    names = ["valid.jpg", "stream", "padding.jpg", "cut.jpg", "text.jpg", "empty.jpg", "other.jpg", "missing.jpg"]
    lines, status = check(capsys, *(files / name for name in names), "--codec.size", 48)
    assert status == 1
    ends = [line.removeprefix(f"{files / name}: ") for line, name in zip(lines, names, strict=True)]
    assert ends[:2] == ["valid", "valid"]
    assert ": padding bits" in ends[2]
    assert "MCU 8, block" in ends[3] and "the file ends here" in ends[3]
    assert "not a JPEG file" in ends[4]
    assert "the file is empty" in ends[5]
    assert "the picture is 64x64, this codec's are 48x48" in ends[6] or "tables" in ends[6]
    assert ends[7] == "cannot be read: No such file or directory"


def test_of_a_run(files, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(configs.to_json(config(run)))
    assert check(capsys, files / "valid.jpg", "--run", run) == ([f"{files / 'valid.jpg'}: valid"], 0)
    lines, status = check(capsys, files / "valid.jpg")  # the default codec's pictures are larger
    assert status == 1 and "48x48, this codec's are 256x256" in lines[0]
    assert "leave the --codec flags out" in check(capsys, "file", "--run", run, "--codec.size", 48)[1]
    assert "no files" in check(capsys)[1]
