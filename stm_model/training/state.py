"""The state of a training run: what a checkpoint holds, and the average of the weights."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from stm_model.io.files import write_torch
from stm_model.network import STM, STMConfig, scribble_tensors
from stm_model.network.decoder import ResBlock
from stm_model.network.efficientnet import InvertedResidual
from stm_model.network.resnet import BasicBlock, Bottleneck
from stm_model.network.trunk import load_trunk
from stm_model.network.weights import check_tensors, read_tensors, write_tensors
from stm_model.runtime import default_dtype
from stm_model.training.config import TrainConfig

# what may differ from the run that is continued: where it is, and how often it tells of itself
_FREE = frozenset(
    ("out", "data", "init", "trunk", "device", "workers", "recompute", "accumulate", "implementation", "tensorboard")
    + ("validate_every", "save_every", "log_every", "picture_every")
)


class TrainState:
    """Network, average, optimiser and gradient scaler of a run, and how many steps they have seen.

    The learning rate and the clips of a step are functions of the step, so the step is all that is kept of schedule
    and sampler.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        """A run's state before its first step, or that of its checkpoint if there is one in `config.out`.

        Raises:
            FileNotFoundError, CheckpointError: `config.init` is not the weights of such a network.
            ValueError: the run in `config.out` was started with other settings, or its checkpoint cannot be read.
        """
        self.config, self.path = config, config.out / "checkpoint.pt"
        torch.manual_seed(config.seed)
        if config.init is not None:
            self.model = _started(config, config.init)
        else:
            self.model = STM(config.network_shape)
            initialize(self.model)
            if config.trunk is not None:
                load_trunk(self.model, config.trunk)
        encoder = self.model.Encoder if self.model.shares_keys else self.model.Encoder_Q
        for name in ("conv1", "bn1", "res2") if config.freeze_first_stage else ():
            encoder.get_submodule(name).requires_grad_(False)
        self.model.to(device, memory_format=torch.channels_last)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.Adam(_parameter_groups(self.model, config.trunk_rate), lr=config.learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.step = 0
        if self.path.is_file():
            self._resume()

    def _resume(self) -> None:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = saved["settings"]
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{self.path}: cannot be read as a checkpoint of a run: {type(error).__name__}") from error
        # a setting that there was not yet when the run began
        settings = TrainConfig(self.config.out).settings | settings
        for name, value in self.config.settings.items():
            if name not in _FREE and settings[name] != value:
                raise ValueError(f"{name}: the run in {self.config.out} has {settings[name]!r}, asked for {value!r}")
        self.model.load_state_dict(saved["model"])
        self.average.update((name, value.to(self.average[name].device)) for name, value in saved["average"].items())
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        self.step = saved["step"]

    def save(self) -> None:
        """Write the averaged weights in float16, and all that going on needs; each whole or not at all."""
        write_tensors(self.average, self.weights_path, torch.float16)
        state = {
            "step": self.step,
            "settings": self.config.settings,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        }
        write_torch(self.path, state)

    @property
    def weights_path(self) -> Path:
        return self.config.out / "weights.safetensors"

    def set_mode(self, step: int) -> None:
        """Training mode, with batch norm frozen from the step on that the settings say."""
        self.model.train()
        all_frozen = step > self.config.freeze_batch_norm * self.config.steps
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and (all_frozen or not module.weight.requires_grad):
                module.eval()

    def update_average(self, step: int) -> None:
        """Move the average of weights and batch-norm statistics by one step; in the first steps it forgets where it
        started. Weights averaged without their statistics would be normalised by those of other weights.
        """
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def averaged(self) -> STM:
        """A network in eval mode with the averaged weights, in the dtype that tracking uses."""
        device = next(self.model.parameters()).device
        model = STM(self.model.config).requires_grad_(False)
        model.load_state_dict(self.average)
        return model.eval().to(device, default_dtype(device), memory_format=torch.channels_last)


def _started(config: TrainConfig, path: Path) -> STM:
    """A network of the shape that the weights have, guided as the run says."""
    tensors = read_tensors(path)
    shape = STMConfig.of_tensors(tensors)
    guidance = config.network_shape.guidance
    if guidance == "scribbles" and shape.guidance == "masks":
        tensors = scribble_tensors(tensors)
    model = STM(replace(shape, guidance=guidance, prior=shape.prior and guidance == "masks"))
    check_tensors(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)
    return model


def _parameter_groups(model: STM, trunk_rate: float) -> list[dict]:
    """The parameters of the trunks, and all others, each with its rate relative to the learning rate."""
    trunk = [name for name, _ in model.named_parameters() if re.match(r"Encoder(_[MQ])?\.(conv1|bn1|res\d)\.", name)]
    groups: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(trunk_rate if name in trunk else 1.0, []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]


def initialize(model: STM) -> None:
    """Random weights that start well: He initialisation, every residual branch closed, every pixel undecided."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        if isinstance(module, InvertedResidual) and module.has_shortcut:
            nn.init.zeros_(module.project[1].weight)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    undecided = (
        (model.Encoder.Key, model.Decoder.predict)
        if model.shares_keys
        else (model.KV_M_r4.Key, model.KV_Q_r4.Key, model.Decoder.pred2)
    )
    for layer in undecided:
        nn.init.normal_(layer.weight, std=0.01)
