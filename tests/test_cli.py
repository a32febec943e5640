"""The command `jpeglm` as people type it: what it prints, what it writes, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from test_pictures import damaged_kinds, file, palette_with_transparency, photo

from jpeglm_jax import cli, codecs, metrics, runs, tokenizer
from jpeglm_jax.data import flags
from jpeglm_jax.sampling import sheets

CONFIG = """
import dataclasses

import tiny

config = tiny.config({run!r})
# Rows, because chunks of the 50,000 flags would have them all measured first.
config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing="rows"))
"""


pytestmark = pytest.mark.usefixtures("compilations")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compilations):
    """A config file and the run that came of it."""
    directory = tmp_path_factory.mktemp("cli")
    path, run = directory / "config.py", directory / "run"
    path.write_text(CONFIG.format(run=str(run)))
    cli.main(["train", str(path), "--train.steps", "3"])
    return str(path), str(run)


def fails(*arguments) -> str:
    """What the command says on its one line of stderr, less `jpeglm: error: `."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    message = stop.value.code  # what the interpreter prints to stderr, with exit status 1
    assert isinstance(message, str) and message.startswith("jpeglm: error: ") and "\n" not in message
    return message.removeprefix("jpeglm: error: ")


def help_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["bench"]])
def test_the_overview_lists_every_command(arguments, capsys):
    cli.main(arguments)
    printed = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"jpeglm {name} " in printed and command.__doc__.splitlines()[0] in printed
    assert max(map(len, printed.splitlines())) <= 130


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_lists_every_flag_with_its_default(name, capsys):
    printed = help_of(capsys, *name.split())
    command = cli.COMMANDS[name]
    assert command.__doc__.splitlines()[0] in " ".join(printed.split())
    fields = command.__dataclass_fields__.keys()
    for field in fields - {"config", "run", "files", "source", "directory"}:
        assert f"--{field.replace('_', '-')}" in printed
    if "config" in fields:
        assert printed.startswith(f"usage: jpeglm {name} CONFIG")
        for flag in ("--model.width", "--codec.quality", "--data.path", "--optim.learning-rate", "--train.steps"):
            assert flag in printed
    else:
        assert ("FILE..." if "files" in fields else "RUN") in printed


def test_help_of_a_config_shows_its_values(trained, capsys):
    assert "(default: 16)" in help_of(capsys, "train", trained[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["frobnicate"], "no command 'frobnicate'; there are: train, sample"),
        (["bench", "speed"], "no command 'bench speed'"),
        (["train"], "needs a config file or a run directory first"),
        (["train", "nowhere.py"], "there is no config file nowhere.py"),
        (["train", "nowhere"], "nowhere is no run: it has no config.json"),
        (["sample"], "RUN Directory of a run"),
        (["sample", "nowhere"], "nowhere is no run"),
        (["evaluate", "nowhere"], "nowhere is no run"),
        (["sample", "nowhere", "--count", "0"], "count must be 1 or more, not 0"),
        (["sample", "nowhere", "--count", "many"], "--count: invalid literal for int.*'many'"),
        (["sample", "nowhere", "--top-p", "2"], "top-p must be above 0 and at most 1, not 2.0"),
        (["sample", "nowhere", "--colour", "red"], "Unrecognized options: --colour, red"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(*arguments))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--modle.width", "3"], "Unrecognized options: --modle.width, 3.* --model.width"),
        (["--codec.quality", "500"], "quality must be from 1 to 100, not 500"),
        (["--codec.subsampling", "4:1:1"], "'4:2:0', '4:2:2', '4:4:4', 'gray'"),
        (["--data.path", "builtin:cats"], "no built-in pictures named 'cats'"),
        (["--data.path", "nowhere"], "no folder nowhere"),
        (["--tokenizer", "nowhere.model"], "cannot read the tokenizer nowhere.model"),
        (["--run", "new", "--mesh.data", "3"], "does not fit 8 devices"),
    ],
)
def test_wrong_settings_are_one_line(trained, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails("train", trained[0], *flags))


@pytest.mark.parametrize(
    "program, message",
    [
        ("x = 1", "must define `config`"),
        ("config = {'width': 3}", "must define `config`"),
        ("from jpeglm_jax.config import *\nconfig = Config(modle=3)", "unexpected keyword argument 'modle'"),
        ("from jpeglm_jax.config import *\nconfig = ModelConfig(width=-1)", "width must be above 0, not -1"),
        ("config = Confg()", "name 'Confg' is not defined"),
        ("config = (", "was never closed"),
    ],
)
def test_a_config_file_that_is_not_right_is_one_line(program, message, tmp_path):
    (tmp_path / "mine.py").write_text(program)
    assert re.search(message, error := fails("train", tmp_path / "mine.py")) and "mine.py" in error


def test_the_program_prints_one_line_and_no_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"modle": {}}')
    command = [Path(sys.executable).with_name("jpeglm"), "sample", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 1 and done.stdout == ""
    # The last line: where libtpu is installed, but no TPU is, JAX warns of it before.
    assert done.stderr.splitlines()[-1].startswith("jpeglm: error: ") and "Traceback" not in done.stderr
    assert "no field modle" in done.stderr


def test_training_again_continues_a_run(trained, capsys):
    cli.main(["train", trained[1], "--train.steps", "4"])
    assert "is trained" in capsys.readouterr().out
    assert metrics.read(trained[1])[-1]["step"] == 4
    assert "model.width is 8, was 16" in fails("train", trained[0], "--model.width", "8")


def test_samples_from_nothing_are_files_and_a_sheet(trained, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--count", "2", "--seed", "7", "--out", str(out), "--json", str(tmp_path / "r.json")]
    cli.main(["sample", trained[1], *options])
    assert sorted(path.name for path in out.iterdir()) == ["sample_0007.jpg", "sample_0008.jpg", "samples.png"]
    assert Image.open(out / "samples.png").format == "PNG"
    assert json.loads((tmp_path / "r.json").read_text())["samples"] == 2
    assert "samples " in capsys.readouterr().out


def test_a_prompt_begins_the_samples(trained, tmp_path):
    Image.fromarray(flags.flag(0, 48)).save(tmp_path / "flag.png")
    out = tmp_path / "out"
    options = ["--prompt", str(tmp_path / "flag.png"), "--ratio", "0.2", "--max-tokens", "400", "--count", "2"]
    cli.main(["sample", trained[1], *options, "--out", str(out)])
    written = [(out / f"sample_000{seed}.jpg").read_bytes() for seed in (0, 1)]
    codec = codecs.make(runs.read(trained[1]).codec)
    prompt = codec.prefix(codec.encode(flags.flag(0, 48)), 0.2)
    assert all(codec.from_file(file)[: len(prompt)].tolist() == prompt.tolist() for file in written)


def test_samples_are_seen_while_they_are_written(trained, tmp_path, caplog):
    caplog.set_level("INFO")
    Image.fromarray(flags.flag(0, 48)).save(tmp_path / "flag.png")
    out = tmp_path / "out"
    options = ["--live", "--prompt", str(tmp_path / "flag.png"), "--ratio", "0.2", "--count", "2"]
    cli.main(["sample", trained[1], *options, "--out", str(out)])
    assert f"{out / 'live.png'} shows the pictures while they are written" in caplog.text
    names = sorted(path.name for path in out.iterdir())
    assert names == ["live.png", "sample_0000.jpg", "sample_0001.jpg", "samples.png", "writing.gif"]
    codec = codecs.make(runs.read(trained[1]).codec)
    streams = [codec.from_file((out / name).read_bytes()) for name in names[1:3]]
    finished = sheets.grid([codec.decode(stream).picture for stream in streams])
    assert np.array_equal(np.asarray(Image.open(out / "live.png")), finished)


def test_a_checkpoint_is_sampled_by_its_directory(trained, tmp_path):
    out = tmp_path / "out"
    cli.main(["sample", f"{trained[1]}/checkpoints/3", "--count", "1", "--out", str(out)])
    assert (out / "sample_0000.jpg").exists()
    assert "checkpoints/9" in fails("sample", f"{trained[1]}/checkpoints/9", "--count", "1", "--out", out)


def test_a_prompt_that_cannot_be_used_is_one_line(trained, tmp_path):
    (tmp_path / "text.jpg").write_text("milk, eggs")
    Image.fromarray(flags.flag(0, 48)).save(tmp_path / "flag.png")
    text, flag = tmp_path / "text.jpg", tmp_path / "flag.png"
    assert "text.jpg cannot be read: not a picture" in fails("sample", trained[1], "--prompt", text)
    assert "No such file" in fails("sample", trained[1], "--prompt", tmp_path / "nowhere.jpg")
    assert "ratio must be from 0 to 1, not 1.5" in fails("sample", trained[1], "--prompt", flag, "--ratio", "1.5")
    assert "nothing is left to write" in fails("sample", trained[1], "--prompt", flag, "--ratio", "1")
    too_few = fails("sample", trained[1], "--prompt", flag, "--ratio", "0.9", "--max-tokens", "70")
    assert re.search(r"max_tokens must be at least \d+", too_few)


def test_a_run_without_a_checkpoint_is_one_line(trained, tmp_path):
    (tmp_path / "config.json").write_text((Path(trained[1]) / "config.json").read_text())
    for command in ("sample", "evaluate"):
        assert f"{tmp_path} has no checkpoint yet" in fails(command, tmp_path)


def test_an_evaluation_shows_and_keeps_its_numbers(trained, tmp_path, capsys):
    cli.main(["evaluate", trained[1], "--count", "2", "--ratio", "0", "--json", str(tmp_path / "report.json")])
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    for name in ("steps", "tokens per second", "bits per byte", "bits per byte order 0", "samples that open", "sheet"):
        assert f"\n{name} " in printed and name.replace(" ", "_") in report
    assert report["bits_per_byte_uniform"] == 8 and 0 < report["bits_per_byte_order_0"] < 8
    assert report["samples"] == 4 and report["samples_that_open"] == 1
    written = [path.name for path in (Path(trained[1]) / "samples").glob("*.jpg")]
    assert len(written) == 8 and sum(name.startswith("unconstrained_") for name in written) == 4
    sheet = Image.open(report["sheet"])
    assert sheet.format == "PNG" and Path(report["sheet"]) == Path(trained[1]) / "samples.png"
    assert "ratio must be from 0 to 1" in fails("evaluate", trained[1], "--ratio", "2")


def test_a_tokenizer_is_learned_from_a_folder_of_photos(trained, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "tokenizer.model"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.jpg")
    options = ["--codec.size", "256", "--vocab-size", "300", "--out", str(out)]
    cli.main(["tokenizer", trained[0], "--data.path", str(folder), *options])
    assert "300 tokens" in capsys.readouterr().out
    learned = tokenizer.load(str(out), 256)
    assert learned.vocab_size == 300
    stream = np.arange(256, dtype=np.uint8)
    assert np.array_equal(learned.decode(learned.encode(stream)), stream)
    assert "at least 260" in fails("tokenizer", trained[0], "--vocab-size", "100", "--out", out, "--pictures", "9")


def picture_folder(folder: Path, good: int) -> int:
    """Files of every unreadable kind, whose number is returned; with `good` flags also every odd but readable kind."""
    folder.mkdir()
    odd = {
        "cmyk": file(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG"),
        "16 bit": file(Image.fromarray(np.full((40, 40), 40000, np.uint16))),
        "palette": palette_with_transparency(),
        "animation": file(photo(40, 40), "GIF", save_all=True, append_images=[photo(40, 40).rotate(90)]),
        "1x1": file(photo(1, 1)),
        "comment": file(photo(40, 40), "JPEG", comment=b"a comment"),
    }
    whole = odd | {f"flag {number}": file(Image.fromarray(flags.flag(number, 48))) for number in range(good)}
    broken = damaged_kinds()
    for kind, data in (broken | whole if good else broken).items():
        (folder / f"{kind}.jpg").write_bytes(data)
    (folder / "unreadable.jpg").symlink_to(folder / "nowhere")  # the owner may read what others may not
    return len(broken) + 1


@pytest.mark.parametrize("packing", ["chunks", "rows"])
def test_bad_pictures_are_skipped_logged_and_counted(packing, trained, tmp_path, caplog):
    bad = picture_folder(tmp_path / "pictures", good=12)
    options = ["--data.path", tmp_path / "pictures", "--data.packing", packing, "--run", tmp_path / "run"]
    cli.main(["train", trained[0], "--train.steps", "3", *map(str, options)])
    messages = [record.getMessage() for record in caplog.records]
    reasons = {message.split(": ")[0] for message in messages if message.startswith("skipped ")}
    for kind in ("empty", "text", "truncated JPEG", "20000x20000", "unreadable"):
        assert f"skipped {kind}.jpg" in reasons
    assert not [message for message in messages if "\n" in message]
    if packing == "chunks":  # measured before training, which then never meets them
        assert f"{bad} of {bad + 18} pictures cannot be read and are left out" in messages
    else:
        lines = metrics.read(tmp_path / "run")
        skipped = [line["train/skipped_pictures"] for line in lines if "train/skipped_pictures" in line][-1]
        assert 6 <= skipped <= bad and f"{skipped} unreadable pictures skipped so far" in messages
    assert metrics.read(tmp_path / "run")[-1]["step"] == 3


def test_an_index_counts_tokens_and_unreadable_pictures(trained, tmp_path, capsys):
    bad = picture_folder(tmp_path / "pictures", good=4)
    options = ["--data.path", str(tmp_path / "pictures"), "--data.packing", "chunks", "--run", str(tmp_path / "run")]
    cli.main(["index", trained[0], *options])
    printed = capsys.readouterr().out
    assert f"{bad + 10} pictures" in printed and f"{bad} unreadable" in printed
    assert (tmp_path / "run" / "lengths.npz").exists()
    cli.main(["train", trained[0], "--train.steps", "3", *options])  # takes it
    assert "measuring" not in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["chunks", "rows"])
def test_a_folder_of_broken_pictures_only_is_one_line(packing, trained, tmp_path):
    picture_folder(tmp_path / "pictures", good=0)
    options = ["--data.path", tmp_path / "pictures", "--run", tmp_path / "run", "--data.packing", packing]
    assert re.search("none of .*pictures.* can be read", fails("train", trained[0], *options))


def test_a_folder_without_pictures_is_one_line(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("milk, eggs")
    options = ["--data.path", tmp_path, "--run", tmp_path / "run"]
    assert f"no pictures in {tmp_path}" in fails("train", trained[0], *options)


def test_benchmarks_print_and_write_their_numbers(trained, tmp_path, capsys):
    for index, photo_of in enumerate((skimage.data.astronaut, skimage.data.coffee)):
        Image.fromarray(photo_of()).save(tmp_path / f"{index}.png")
    path = str(tmp_path / "bench.json")
    options = ["--data.path", str(tmp_path), "--codec.size", "256", "--pictures", "2", "--rounds", "1", "--json", path]
    cli.main(["bench", "input", trained[0], *options])
    printed, rows = capsys.readouterr().out, json.loads(Path(path).read_text())
    assert rows["pictures"] == 2 and rows["pillow, images/s"] > 0 and rows["published, images/s"] > 0
    assert all(name in printed for name in rows)
    cli.main(["bench", "train", trained[0], "--rounds", "1", "--json", path])
    printed, rows = capsys.readouterr().out, json.loads(Path(path).read_text())
    assert rows["step_over_products"] > 0 and rows["mfu"] is None
    assert all(name.replace("_", " ") in printed for name in rows)
