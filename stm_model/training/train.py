"""Train the network: `stm train --out RUN --data DAVIS`.

On N GPUs `torchrun --nproc-per-node N -m stm_model train --out RUN --data DAVIS`, which gives the same weights.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stm_model.data.clips import Clip
from stm_model.distributed import Ranks
from stm_model.progress import Progress
from stm_model.runtime import default_dtype, usable_device, warn_if_emulated
from stm_model.training.config import TrainConfig
from stm_model.training.datasets import batches, training_clips, validation_sequences
from stm_model.training.loss import ClipLoss
from stm_model.training.report import Report, validate, warn
from stm_model.training.rounds import RoundsLoss
from stm_model.training.state import TrainState

_STARVED = 0.2
"""Share of a step's time spent waiting for clips, above which more workers are advised."""


def train(config: TrainConfig) -> Path:
    """Run or resume a training run, alone or as one of torchrun's processes.

    Returns:
        The weights' file, `<out>/weights.safetensors`: the averaged weights in float16.

    Raises:
        FileNotFoundError: a data folder, its list or a sequence is missing.
        ValueError: the run in `out` was started with other settings, frames and masks of a dataset don't match, it has
            nothing that can be read, the batch cannot be shared out, or the loss is no number any more.
    """
    device = usable_device(Ranks().device(config.device))
    on_gpu = device.type == "cuda"
    with Ranks("nccl" if on_gpu else "gloo", timeout=None) as ranks:
        if on_gpu:
            torch.cuda.set_device(device)
        if config.batch % (ranks.count * config.accumulate):
            parts = f"{ranks.count} processes × {config.accumulate} parts"
            raise ValueError(f"batch: expected a multiple of {parts}, got {config.batch}")
        dataset, held_out = training_clips(config), validation_sequences(config)
        state = TrainState(config, device)
        config.out.mkdir(parents=True, exist_ok=True)
        report = Report(config, state.step, first_process=ranks.first)
        _Training(config, state, report, ranks.index, ranks.count).run(dataset, held_out)
    return state.weights_path


class _Training:
    """The loop of one process."""

    def __init__(self, config: TrainConfig, state: TrainState, report: Report, rank: int, processes: int):
        self.config, self.state, self.report, self.rank, self.processes = config, state, report, rank, processes
        self.device = next(state.model.parameters()).device
        dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(self.device)
        warn_if_emulated(dtype, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        reading = {"implementation": config.implementation, "top_k": config.top_k}
        self.loss: nn.Module = (
            RoundsLoss(state.model, config.rounds, config.dice, config.recompute, **reading)
            if config.rounds
            else ClipLoss(state.model, config.dice, config.recompute, config.prior_noise, **reading)
        )
        self.predict = self.loss.predict
        if processes > 1:
            self.loss = DistributedDataParallel(
                self.loss, device_ids=[self.device] if self.device.type == "cuda" else None
            )

    def run(self, dataset, held_out: list) -> None:
        """All steps that are left."""
        made = batches(self.config, dataset, self.state.step, self.rank, self.processes)
        # the workers end with the steps, however these end
        with contextlib.closing(made) as parts:
            self._steps(parts, held_out)

    def _steps(self, parts: Iterator[list[Clip]], held_out: list) -> None:
        config, state = self.config, self.state
        numbers = range(state.step + 1, config.steps + 1)
        progress = Progress(
            numbers, desc="train", unit="step", shown=not self.rank, initial=state.step, total=config.steps
        )
        losses: list[float] = []
        spent = waited = 0.0
        for step in progress:
            state.set_mode(step)
            started = time.perf_counter()
            loss, waiting = self._step(step, parts)
            spent, waited = spent + time.perf_counter() - started, waited + waiting
            losses.append(loss)
            progress.set_postfix(loss=f"{fmean(losses[-50:]):.3f}", refresh=False)
            if step % config.log_every == 0:
                self._log(step, fmean(losses[-config.log_every :]), spent / len(losses), waited / len(losses))
            last = step == config.steps
            if self.rank == 0 and (step % config.save_every == 0 or last):
                state.save()
            if held_out and (step % config.validate_every == 0 or last):
                self.report.metrics(step, **validate(state.averaged(), held_out, self.rank, self.processes))

    def _step(self, step: int, parts: Iterator[list[Clip]]) -> tuple[float, float]:
        """One optimiser step; returns its loss over all processes and the seconds spent waiting for clips."""
        config, state = self.config, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = group["rate"] * config.learning_rate * schedule(step, config)
        state.optimizer.zero_grad(set_to_none=True)
        total, waited = torch.zeros((), device=self.device), 0.0
        for part in range(config.accumulate):
            asked = time.perf_counter()
            clips = next(parts)
            waited += time.perf_counter() - asked
            self.report.passed_over(clips)
            clips = [
                clip._replace(frames=clip.frames.to(self.device), labels=clip.labels.to(self.device)) for clip in clips
            ]
            total += self._gradients(clips, last=part == config.accumulate - 1)
        if self.processes > 1:
            dist.all_reduce(total)
        loss = total.item() / self.processes
        if not math.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss}; a lower learning rate may help, or --dtype float32")
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_gradient)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.update_average(step)
        state.step = step
        if config.picture_every and step % config.picture_every == 0:
            self._draw(step, clips[0])
        return loss, waited

    def _gradients(self, clips: list[Clip], last: bool) -> Tensor:
        """Add the gradients of a part of a step; returns its share of the loss."""
        # the processes average their gradients once, with the last part
        alone = self.processes > 1 and not last
        with self.loss.no_sync() if alone else contextlib.nullcontext():
            with self.autocast:
                loss = self.loss(clips) / self.config.accumulate
            self.state.scaler.scale(loss).backward()
        return loss.detach()

    def _log(self, step: int, loss: float, seconds: float, waiting: float) -> None:
        self.report.metrics(
            step,
            loss=loss,
            learning_rate=self.config.learning_rate * schedule(step, self.config),
            seconds_per_step=round(seconds, 4),
            seconds_waiting=round(waiting, 4),
            unreadable=len(self.report.unreadable),
        )
        if self.rank == 0 and step == self.config.log_every and waiting > _STARVED * seconds:
            warn(f"{waiting:.2f} s of each {seconds:.2f} s step are spent waiting for clips; more --workers help")

    def _draw(self, step: int, clip: Clip) -> None:
        if self.rank:
            return
        with torch.no_grad(), self.autocast:
            predictions = self.predict(clip)
        self.report.picture(step, clip, predictions)


def schedule(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate at step 1 … steps: linear warm-up, constant, the schedule's fall to zero."""
    rising = step / max(1, config.warmup)
    left = min(1.0, (config.steps - step + 1) / max(1.0, config.decay * config.steps))
    falling = {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "poly": left**0.9,
    }[config.schedule]
    return min(1.0, rising, falling)
