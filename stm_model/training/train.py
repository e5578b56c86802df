"""Train the network on procedural clips and a DAVIS-layout folder: `stm train --out RUN --data DAVIS`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stm_model.checkpoint import write_tensors
from stm_model.data.clips import Clip
from stm_model.data.davis import DavisClips, davis_sequences
from stm_model.data.synthetic import ProceduralClips
from stm_model.network import STM, STRIDE, STMConfig
from stm_model.network.decoder import ResBlock
from stm_model.runtime import default_device, default_dtype
from stm_model.training.loss import clip_loss


@dataclass(frozen=True)
class TrainConfig:
    """A training run of the small network."""

    out: Path
    """Folder of the run: weights, checkpoint and metrics. A run found there goes on from its checkpoint."""
    data: Path | None = None
    """Folder in the DAVIS layout; None trains on procedural clips alone."""
    split: str = "fit"
    """List under ImageSets to train on."""
    validation_split: str | None = "held"
    """List under ImageSets to score the weights on; None never scores."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 8
    """Clips per step."""
    frames: int = 3
    """Frames per clip."""
    crop: int = 192
    """Height and width of a training clip, in pixels."""
    procedural: float = 0.25
    """Share of procedural clips where a data folder is given."""
    max_skip: int = 8
    """Greatest number of video frames from one frame of a clip to the next."""
    learning_rate: float = 2e-4
    """Adam's learning rate after the warm-up."""
    warmup: int = 300
    """Steps over which the learning rate rises from zero."""
    decay: float = 0.5
    """Last share of the steps, over which the learning rate falls linearly to zero."""
    freeze_batch_norm: float = 0.4
    """Share of the steps after which batch norm keeps its statistics; 0 for pretrained trunks."""
    clip_gradient: float = 1.0
    """Greatest norm of the gradient."""
    ema: float = 0.998
    """Decay per step of the averaged weights, which are the ones written."""
    validate_every: int = 1000
    """Steps between scores on the validation split."""
    save_every: int = 250
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, each with the mean loss since the last."""
    seed: int = 0
    """Seed of weights and clips."""
    device: str | None = None
    """Where to train; None for the GPU if there is one."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch": 1, "frames": 2, "max_skip": 1, "crop": STRIDE}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.crop % STRIDE:
            raise ValueError(f"crop: expected a multiple of {STRIDE} pixels, got {self.crop}")
        for name in ("procedural", "decay", "freeze_batch_norm", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")


class MixedClips(Dataset):
    """Draws item i from one of two datasets, by a share that i's own seed decides."""

    def __init__(self, first: Dataset, second: Dataset, share_of_second: float):
        self.first, self.second, self.share = first, second, share_of_second

    def __getitem__(self, seed: int) -> Clip:
        random = torch.Generator().manual_seed(2**32 + seed)
        return (self.second if torch.rand((), generator=random) < self.share else self.first)[seed]


def train(config: TrainConfig) -> Path:
    """Run or resume a training run.

    Returns:
        The weights' file, `<out>/weights.safetensors`: the averaged weights in float16.

    Raises:
        FileNotFoundError: the data folder, its list or a sequence is missing.
        ValueError: the run in `out` was started with other settings, or frames and masks of a sequence don't match.
    """
    device = torch.device(config.device) if config.device else default_device()
    dataset = _dataset(config)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = STM(STMConfig.small()).to(device, memory_format=torch.channels_last)
    initialize(model)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    start = _resume(config, model, average, optimizer)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=default_dtype(device) == torch.bfloat16)
    losses: list[float] = []
    started = time.perf_counter()
    progress = tqdm(_batches(config, dataset, start), initial=start, total=config.steps, desc="train", unit="step")
    for step, clips in enumerate(progress, start=start + 1):
        _set_mode(model, frozen=step > config.freeze_batch_norm * config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        with autocast:
            loss = clip_loss(model, [Clip(clip.frames.to(device), clip.labels.to(device)) for clip in clips])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_gradient)
        optimizer.step()
        update_average(average, model, config.ema)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
        if step % config.log_every == 0:
            recent = losses[-config.log_every :]
            seconds = (time.perf_counter() - started) / len(losses)
            _log(config, step=step, loss=sum(recent) / len(recent), seconds_per_step=round(seconds, 3))
        last = step == config.steps
        if step % config.save_every == 0 or last:
            _save(config, step, model, average, optimizer)
        if config.data and config.validation_split and (step % config.validate_every == 0 or last):
            _log(config, step=step, **validate(averaged(model.config, average, device), config))
    return config.out / "weights.safetensors"


def initialize(model: STM) -> None:
    """Random weights that start well: He initialisation, every residual branch closed, every pixel undecided."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d) and name.endswith("bn2"):
            nn.init.zeros_(module.weight)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    for layer in (model.KV_M_r4.Key, model.KV_Q_r4.Key, model.Decoder.pred2):
        nn.init.normal_(layer.weight, std=0.01)


def schedule(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to zero."""
    rising = step / max(1, config.warmup)
    falling = (config.steps - step + 1) / max(1, config.decay * config.steps)
    return min(1.0, rising, falling)


def validate(model: STM, config: TrainConfig) -> dict[str, float]:
    """Mean J and F of the tracker on the validation split, first and last frame left out."""
    from stm_model.evaluation.metrics import sequence_scores
    from stm_model.tracker import Tracker

    scores = []
    for sequence in tqdm(davis_sequences(config.data, config.validation_split), desc="validate", leave=False):
        frames, truths = sequence.load()
        results = Tracker(model).track(frames, {0: truths[0]})
        scores += sequence_scores([result.labels for result in results], truths).values()
    return {"J": sum(j for j, _ in scores) / len(scores), "F": sum(f for _, f in scores) / len(scores)}


def update_average(average: dict[str, Tensor], model: STM, decay: float) -> None:
    """Move the exponential moving average of weights and batch-norm statistics by one step.

    Weights averaged without their statistics would be normalised by those of other weights.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def averaged(config: STMConfig, average: dict[str, Tensor], device: torch.device) -> STM:
    """A network in eval mode with the averaged weights, in the dtype that tracking uses."""
    model = STM(config).requires_grad_(False)
    model.load_state_dict(average)
    return model.eval().to(device, default_dtype(device), memory_format=torch.channels_last)


def _set_mode(model: STM, frozen: bool) -> None:
    model.train()
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()


def _dataset(config: TrainConfig) -> Dataset:
    size = (config.crop, config.crop)
    procedural = ProceduralClips(config.frames, size)
    if config.data is None:
        return procedural
    real = DavisClips(davis_sequences(config.data, config.split), config.frames, size, config.max_skip)
    if config.validation_split:
        davis_sequences(config.data, config.validation_split)  # a missing one is an error now, not after hours
    return MixedClips(real, procedural, config.procedural)


def _batches(config: TrainConfig, dataset: Dataset, start: int) -> Iterator[list[Clip]]:
    """Batches of steps start + 1 … steps; each is a function of its step and the seed alone."""
    first = config.seed * 10_000_000
    seeds = [
        [first + step * config.batch + item for item in range(config.batch)] for step in range(start, config.steps)
    ]
    loader = DataLoader(dataset, batch_sampler=seeds, collate_fn=_with_objects, num_workers=1, prefetch_factor=4)
    yield from loader


def _with_objects(clips: list[Clip]) -> list[Clip]:
    """The clips that show an object in their first frame; at least one of a batch does in practice."""
    return [clip for clip in clips if clip.objects]


def _settings(config: TrainConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _save(
    config: TrainConfig, step: int, model: STM, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    write_tensors(average, config.out / "weights.safetensors", torch.float16)
    state = {
        "step": step,
        "settings": _settings(config),
        "model": model.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
    }
    temporary = config.out / "checkpoint.pt.part"
    torch.save(state, temporary)
    os.replace(temporary, config.out / "checkpoint.pt")


def _resume(config: TrainConfig, model: STM, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load the run's checkpoint if there is one; return the step it was written at."""
    path = config.out / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in _settings(config).items():
        if (
            name not in ("out", "data", "device", "validate_every", "save_every", "log_every")
            and state["settings"][name] != value
        ):
            raise ValueError(f"{name}: the run in {config.out} has {state['settings'][name]!r}, asked for {value!r}")
    model.load_state_dict(state["model"])
    average.update((name, value.to(average[name].device)) for name, value in state["average"].items())
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _log(config: TrainConfig, **values: float) -> None:
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")
