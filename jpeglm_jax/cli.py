"""The command `jpeglm`: every subcommand is a dataclass, its fields are the flags, calling it does the work."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jpeglm_jax import config as configs
from jpeglm_jax.config import Config, JpegConfig

SettingsOf = Annotated[Config, tyro.conf.arg(name="")]
"""A config whose fields are flags of their own: `--model.width 128`."""

RunOf = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass
class Train:
    """Trains a model, or continues a run: `jpeglm train CONFIG [--data.path FOLDER ...]` or `jpeglm train RUN`.

    A run continues from its newest checkpoint and reaches what it would have reached without the break, on whatever devices
    and hosts. On several hosts the same command is started on each; see JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID where it is neither TPU nor Slurm. Exit status: 0 trained, 75 stopped by SIGTERM and saved, 1 an error.
    """

    config: SettingsOf = Config()

    def __call__(self) -> None:
        from jpeglm_jax import distributed

        first = distributed.initialize()
        from jpeglm_jax.train import train  # after it: what is imported may look at devices

        train(self.config)
        if first:
            print(f"{self.config.run} is trained; `jpeglm evaluate {self.config.run}` shows what came of it")


@dataclasses.dataclass
class Sample:
    """Writes pictures: from nothing, or completing the beginning of a picture."""

    run: RunOf
    """Directory of a run, or of one of its checkpoints."""
    prompt: str = ""
    """A picture file to complete; without one, pictures are written from nothing."""
    ratio: float = 0.5
    """Part of the prompt's MCUs that is kept."""
    count: int = 4
    """Pictures to write."""
    out: str = "samples"
    """Directory for the .jpg files and the sheet."""
    temperature: float = 1.0
    """0 takes the most probable byte or token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; the paper takes 40 or 80."""
    top_p: float = 1.0
    """Draw from the most probable tokens that reach this probability; the paper takes 0.9 or 1."""
    seed: int = 0
    """Of the first sample; each next has the next seed."""
    max_tokens: int | None = None
    """Of a picture, prompt included: it ends by then. By default the run's sequence length."""
    unconstrained: bool = False
    """Let the model write what is no picture, as in the paper; by default only streams that open can be written."""
    live: bool = False
    """Show the pictures while they are written, in OUT/live.png, and leave the animation OUT/writing.gif."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.sampling import live
        from jpeglm_jax.sampling.command import sample

        if self.count < 1:
            raise ValueError(f"count must be 1 or more, not {self.count}")
        rows = sample(
            self.run,
            self.prompt,
            self.ratio,
            range(self.seed, self.seed + self.count),
            _sampler(self),
            self.max_tokens,
            not self.unconstrained,
            self.out,
            live.in_file(Path(self.out) / "live.png") if self.live else None,
        )
        tables.show(f"samples of {self.run}", list(rows.items()))
        tables.write_json(self.json, rows)


@dataclasses.dataclass
class Evaluate:
    """Scores a run on held-out pictures, samples from it, and draws the sheet RUN/samples.png."""

    run: RunOf
    """Directory of a run."""
    count: int = 8
    """Pictures in each row of the sheet."""
    ratio: float = 0.5
    """Part of a picture that its completion begins from."""
    temperature: float = 1.0
    """0 takes the most probable byte or token."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float = 1.0
    """Draw from the most probable tokens that reach this probability."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.evaluation.report import report

        if self.count < 1:
            raise ValueError(f"count must be 1 or more, not {self.count}")
        rows = report(self.run, self.count, self.ratio, _sampler(self))
        tables.show(self.run, [(name.replace("_", " "), value) for name, value in rows.items()])
        tables.write_json(self.json, rows)


@dataclasses.dataclass
class Tokenizer:
    """Learns a BPE vocabulary from pictures: `jpeglm tokenizer CONFIG --out FILE`."""

    config: SettingsOf = Config()
    out: str = "tokenizer.model"
    """A SentencePiece model in the published format."""
    vocab_size: int = 320
    """Entries, the 3 specials, 256 bytes and the prefix included."""
    pictures: int = 10_000
    """Training pictures to learn from, at most."""

    def __call__(self) -> None:
        from jpeglm_jax.data.pipeline import learn_tokenizer

        tokenizer, saved = learn_tokenizer(self.config, self.pictures, self.vocab_size, self.out)
        print(f"{self.out}: {tokenizer.vocab_size} tokens; a picture is {saved:.1%} shorter than in bytes")


@dataclasses.dataclass
class Index:
    """Measures the tokens of every picture, so that a run need not: `jpeglm index CONFIG [--run RUN]`.

    Needed once where pictures are cut in chunks. `jpeglm train` does the same when it finds no index in its run directory.
    """

    config: SettingsOf = Config()

    def __call__(self) -> None:
        from jpeglm_jax import runs
        from jpeglm_jax.data.pipeline import Data

        path = Path(self.config.run) / runs.LENGTHS
        lengths = Data(self.config).lengths(path)
        print(f"{path}: {len(lengths):,} pictures, {lengths.sum(dtype=int):,} tokens, {(lengths == 0).sum():,} unreadable")


@dataclasses.dataclass
class Check:
    """Says whether files are valid streams of the codec, or where and why not.

    `jpeglm check FILE... [--run RUN | --codec.size 64 ...]`. The exit status is 1 if a file is not valid.
    """

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """.jpg files, or streams without tables."""
    run: str = ""
    """A run whose codec is meant; else the flags say which."""
    codec: JpegConfig = JpegConfig()

    def __call__(self) -> None:
        from jpeglm_jax.grammar.check import check

        if self.run:
            from jpeglm_jax import runs

            if self.codec != JpegConfig():
                raise ValueError("--run brings its own codec: leave the --codec flags out, or --run")
            self.codec = runs.read(self.run).codec
        if not check(self.files, self.codec):
            sys.exit(1)


@dataclasses.dataclass
class Import:
    """Makes a run of a Hugging Face Llama, like the published weights: `jpeglm import SOURCE RUN`.

    The run can be sampled, evaluated and trained on: `jpeglm train RUN --data.path FOLDER` begins with a fresh optimizer.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A directory, or a name on the Hugging Face hub: uwnlp/jpeg-lm-reimplementation."""
    run: RunOf
    """Directory of the new run."""
    codec: JpegConfig = JpegConfig()
    """Of its pictures, where the source does not say; the defaults are the paper's."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.hf import import_run

        tables.show(f"import of {self.source}", list(import_run(self.source, self.run, self.codec).items()))


@dataclasses.dataclass
class Export:
    """Writes a run as a Hugging Face Llama that transformers and vLLM load: `jpeglm export RUN DIRECTORY`."""

    run: RunOf
    """Directory of a run, or of one of its checkpoints."""
    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIRECTORY")]
    """To be written: safetensors, config, tokenizer, model card."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; None leaves them as they are."""

    def __call__(self) -> None:
        from jpeglm_jax import distributed

        first = distributed.initialize()
        from jpeglm_jax import tables
        from jpeglm_jax.hf import export_run

        rows = export_run(self.run, self.directory, self.dtype)
        if first:
            tables.show(f"export of {self.run}", list(rows.items()))


@dataclasses.dataclass
class Preflight:
    """Compiles a run for slices of TPUs without having any: `jpeglm preflight CONFIG --topology v5e-64 v6e-64`.

    Says whether training and sampling fit, what bounds their speed, how long the run takes, and whether hosts can make
    the pictures ready. The exit status is 1 if something does not fit. Takes a minute or two a slice.
    """

    config: SettingsOf = Config()
    topology: tuple[str, ...] = ("v5e-64",)
    """Slices: v5e-64 (chips), v5p-64 (cores), v6e-256, 2xv5e-64 (two slices)."""
    mfu: float = 0.5
    """Part of the chips' peak that is reckoned with: what a run reaches cannot be known without the chip."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.preflight.report import preflight

        columns, fits = preflight(self.config, self.topology, self.mfu)
        tables.show_columns(f"{self.config.run}, compiled without a TPU", columns)
        print("Not known without the chip: the time of kernels and collectives beside the rest, and so the true MFU.")
        tables.write_json(self.json, columns)
        if not fits:
            sys.exit(1)


@dataclasses.dataclass
class BenchInput:
    """Measures the input pipeline on one core against the published steps and against libjpeg alone."""

    config: SettingsOf = Config()
    pictures: int = 300
    """Photos in a round."""
    rounds: int = 5
    """Of each pipeline, in turn; medians are shown."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.benchmarks.input import bench_input

        rows = bench_input(self.config, self.pictures, self.rounds)
        tables.show("input pipeline, one core", list(rows.items()))
        tables.write_json(self.json, rows)


@dataclasses.dataclass
class BenchTrain:
    """Measures a training step against its matrix products alone, and against the device's peak."""

    config: SettingsOf = Config()
    rounds: int = 7
    """Of the step and of the products, in turn; medians are shown."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.benchmarks.train import bench_train

        rows = bench_train(self.config, self.rounds)
        tables.show("training step", [(name.replace("_", " "), value) for name, value in rows.items()])
        tables.write_json(self.json, rows)


@dataclasses.dataclass
class BenchDecode:
    """Measures sampling: tokens a second, the cost of the grammar, and the part of the memory bandwidth used."""

    config: SettingsOf = Config()
    batches: tuple[int, ...] = (1, 8, 32)
    """Pictures written at the same time."""
    length: int = 0
    """Positions of the cache, half of them in use; 0 takes the sequence length."""
    steps: int = 64
    """In a round."""
    rounds: int = 7
    """Of the loop with the grammar, the loop without, and a large copy, in turn; medians are shown."""
    json: str = ""
    """Also write what the table says to this file."""

    def __call__(self) -> None:
        from jpeglm_jax import tables
        from jpeglm_jax.benchmarks.decode import bench_decode

        rows = bench_decode(self.config, self.batches, self.length, self.steps, self.rounds)
        tables.show("sampling", list(rows.items()))
        tables.write_json(self.json, rows)


COMMANDS = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "tokenizer": Tokenizer,
    "index": Index,
    "check": Check,
    "import": Import,
    "export": Export,
    "preflight": Preflight,
    "bench input": BenchInput,
    "bench train": BenchTrain,
    "bench decode": BenchDecode,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; an error of use is one line and exit status 1, or a traceback with JPEGLM_TRACEBACK set."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # Orbax raises the first error of a save; asyncio would print the traceback of each other array's.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        sys.exit("\njpeglm: stopped; `jpeglm train RUN` goes on from the newest checkpoint")
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("JPEGLM_TRACEBACK"):
            raise
        sys.exit(f"jpeglm: error: {' '.join(str(error).split())}")


def _run(arguments: list[str]) -> None:
    words = 2 if arguments[:1] == ["bench"] else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name in ("", "-h", "--help", "bench", "bench -h", "bench --help"):
        print(_overview())
        return
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; there are: {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    default = None
    if command.__dataclass_fields__.keys() & {"config"}:
        # The values of the config file are the defaults of the flags, so it is read before them.
        if rest and not rest[0].startswith("-"):
            default = command(config=load_config(rest[0]))
            name, rest = f"{name} {rest[0]}", rest[1:]
        elif {"-h", "--help"} & set(rest):
            name = f"{name} CONFIG"
        else:
            raise ValueError(f"`jpeglm {name}` needs a config file or a run directory first, like configs/quickstart.py")
    chosen = _parse(command, default, rest, f"jpeglm {name}")
    _cache_compilations()
    chosen()


def _parse(command: type, default: Any, arguments: list[str], prog: str) -> Any:
    """The command with its fields set by the flags.

    Raises:
      ValueError: in one line, what tyro draws a box around.
    """
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(command, default=default, args=arguments, prog=prog, description=inspect.getdoc(command))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # A title, then parts with a line between them, the last of which says where help is.
        lines = [line.strip("╭╮╰╯│─ ") for line in drawn.getvalue().splitlines()[1:]]
        parts = [" ".join(part).rstrip(".") for empty, part in itertools.groupby(lines, "".__eq__) if not empty]
        raise ValueError("; ".join(parts)) from stop


def load_config(path: str) -> Config:
    """The config of a `.py` file that defines `config`, or of a run directory.

    Raises:
      ValueError: neither, or a file that is not right.
    """
    if Path(path).suffix == ".py":
        try:
            config = runpy.run_path(path).get("config")
        except FileNotFoundError as error:
            raise ValueError(f"there is no config file {path}") from error
        except Exception as error:  # it is a program: a misspelt field is a TypeError of the dataclass, and so on
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(config, Config):
            raise ValueError(f"{path} must define `config`, a jpeglm_jax.config.Config")
        return config
    from jpeglm_jax import runs

    return runs.read(path)


def _sampler(flags: Sample | Evaluate):
    from jpeglm_jax.sampling.rules import Sampler

    return Sampler(flags.temperature, flags.top_k, flags.top_p)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  jpeglm {name:<{width}}  {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: jpeglm COMMAND ...",
        "",
        "A Llama-2 decoder that writes pictures by writing the bytes of JPEG files.",
        "",
        *lines,
        "",
        "`jpeglm COMMAND --help` shows the flags of one; `jpeglm train configs/quickstart.py` is a first run.",
    ])


def _cache_compilations() -> None:
    """Keeps compiled programs between commands, where JAX is not told otherwise."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jpeglm", "compilations"))
