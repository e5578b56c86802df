"""`stm train`: the settings are those of a preset, see `stm_model.training.config`."""

from __future__ import annotations

from stm_model.training.config import PRESETS, TrainConfig

__all__ = ["PRESETS", "train"]


def train(config: TrainConfig) -> int:
    """Run or resume a training run and print where its weights are; the exit code."""
    from stm_model.training.train import train as run_training

    print(f"weights: {run_training(config)}")
    return 0
