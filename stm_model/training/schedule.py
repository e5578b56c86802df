"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from stm_model.training.config import TrainConfig


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
