"""Arithmetic of a step, throughput against the peak of the device, and where curves are written."""

import json
import logging
import math
import sys
import time

import jax
import numpy as np
import tensorboardX
import tqdm
from etils import epath

from jpeglm_jax import files, loss, optim
from jpeglm_jax.config import Config, ModelConfig
from jpeglm_jax.loss import Sums

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"

MEMORY = 100
"""Steps that the running mean of the loss remembers, about."""

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}
"""Dense bfloat16 FLOP/s of a device (T4: float16), by the beginning of its `device_kind`; from the makers' data sheets."""


def train_flops(config: ModelConfig, tokens: int, sequence_length: int) -> float:
    """FLOPs of forward and backward on `tokens` tokens in rows of `sequence_length`, without what remat repeats.

    Matrix products only, 2 FLOPs a multiply-add, backward twice the forward; causal attention is half of the full square
    (the appendix of Chowdhery et al. 2022, which counts it whole).
    """
    heads = config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    weights = config.layers * config.width * (heads + 3 * config.mlp_width) + config.width * config.vocab_size
    attention = config.layers * config.heads * config.head_dim * sequence_length
    return 6.0 * tokens * (weights + attention)


def peak_flops(device: jax.Device) -> float | None:
    """Of a device, or None where it is not known: on CPUs."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


class BadStep(RuntimeError):
    """A step that spoilt the model; see `TrainConfig.spike`. The message is one line."""

    def __init__(self, message: str, step: int, batch: int):
        super().__init__(message)
        self.step, self.batch = step, batch


class Recorder:
    """Follows a run: progress bar, curves and pictures for TensorBoard, and every number in RUN/metrics.jsonl.

    Of several processes only the first shows and writes anything; all of them watch the loss, and see the same.
    """

    def __init__(self, config: Config, first: int, typical: float | None):
        """Goes on at step `first`; what an interrupted run had written beyond it is dropped.

        Args:
          typical: the running mean of bits per byte that the steps before had left; None before the first.
        """
        self.config, self.run, self.typical = config, epath.Path(config.run), typical
        self.writes = jax.process_index() == 0
        self.lines = [line for line in read(config.run) if line["step"] <= first] if self.writes else []
        self.board = tensorboardX.SummaryWriter(config.run, purge_step=first + 1, write_to_disk=self.writes)
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants fewer lines than a terminal
        self.bar = tqdm.tqdm(
            total=config.train.steps,
            initial=first,
            unit=" steps",
            dynamic_ncols=True,
            mininterval=interval,
            disable=not self.writes,
        )
        self.schedule = optim.learning_rate(config.optim, config.train.steps)
        peak = peak_flops(jax.devices()[0])
        self.peak = peak and peak * jax.device_count()
        self.running: tuple[int, int, Sums] | None = None
        self.window: list[dict[str, float]] = []
        self.timed: list[tuple[float, float]] = []
        self.clock: float | None = None
        self.skipped = 0

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.board.close()

    def step(self, step: int, batch: int, totals: Sums, skipped: int) -> None:
        """Takes the sums of a step that has just begun to run, and reads those of the one before.

        Args:
          batch: number of the batch that the step takes.
          skipped: pictures of this process's part of it that are unreadable.

        Raises:
          BadStep: the step before was one, by the rule of `TrainConfig.spike`.
        """
        before, self.running = self.running, (step, batch, totals)
        self._read(before)
        if skipped:
            self.skipped += skipped
            log.warning("%d unreadable pictures skipped so far", self.skipped)

    def finish(self) -> None:
        """Waits for the step that is running; what follows is not part of the throughput.

        Raises:
          BadStep: it was one.
        """
        before, self.running = self.running, None
        self._read(before)
        self.clock = None

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """`loss` and `bits_per_byte` of held-out pictures."""
        self._write(step, {f"held_out/{name}": value for name, value in values.items()})
        if self.writes:
            self.bar.write(f"step {step}: {values['bits_per_byte']:.3f} bits per byte on held-out pictures")

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """uint8 (height, width, 3)."""
        self.board.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Puts everything on disk."""
        if self.writes:
            self.board.flush()
            files.write(self.run / FILE, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def _read(self, running: tuple[int, int, Sums] | None) -> None:
        if running is None:
            return
        step, batch, sums = running
        totals = {name: float(value) for name, value in jax.device_get(sums).items()}
        bits = loss.summary(totals)["bits_per_byte"]
        self._watch(step, batch, bits, totals["grad_norm"])
        now = time.perf_counter()
        if self.clock is not None:  # not the first step after a pause or a compilation
            self.timed.append((now - self.clock, totals["tokens"]))
        self.clock = now
        self.window.append(totals)
        self.bar.set_postfix_str(f"{bits:.3f} bits per byte", refresh=False)
        self.bar.update()
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self._write(step, self._summary(step))
            self.window, self.timed = [], []

    def _watch(self, step: int, batch: int, bits: float, grad_norm: float) -> None:
        spike, typical = self.config.train.spike, bits if self.typical is None else self.typical
        if not (math.isfinite(bits) and math.isfinite(grad_norm)):
            what = f"the loss is {bits} bits per byte and the norm of its gradient {grad_norm}"
        elif spike is not None and bits > typical + spike:
            what = f"the loss is {bits:.3f} bits per byte, more than train.spike ({spike}) above the mean of {typical:.3f},"
        else:
            self.typical = typical + (bits - typical) / MEMORY
            return
        raise BadStep(f"{what} at step {step}, batch {batch}", step, batch)

    def _summary(self, step: int) -> dict[str, float]:
        sums = {name: sum(totals[name] for totals in self.window) for name in ("nll", "tokens", "symbols")}
        values = {f"train/{name}": value for name, value in loss.summary(sums).items()}
        values["train/grad_norm"] = self.window[-1]["grad_norm"]
        values["train/learning_rate"] = float(self.schedule(step - 1))
        values["train/skipped_pictures"] = self.skipped
        if seconds := sum(seconds for seconds, _ in self.timed):
            values["speed/tokens_per_second"] = sum(tokens for _, tokens in self.timed) / seconds
            values["speed/steps_per_second"] = len(self.timed) / seconds
            if self.peak:
                data = self.config.data
                flops = train_flops(self.config.model, data.batch_size * data.sequence_length, data.sequence_length)
                values["speed/mfu"] = flops * len(self.timed) / seconds / self.peak
        return values

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.lines.append({"step": step, **values})


def read(run: epath.PathLike) -> list[dict[str, float]]:
    """All numbers of a run in the order of steps, as of its newest checkpoint."""
    path = epath.Path(run) / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
