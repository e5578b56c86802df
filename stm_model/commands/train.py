"""`stm train`: the settings are those of a preset, see `stm_model.training.config`."""

from stm_model.commands.exits import interrupted
from stm_model.training.config import PRESETS, TrainConfig

__all__ = ["PRESETS", "train"]


def train(config: TrainConfig) -> int:
    """Run or resume a training run and print where its weights are; the exit code."""
    from stm_model.training.train import train as run_training

    try:
        print(f"weights: {run_training(config)}")
    except KeyboardInterrupt:
        saved = f"from the last checkpoint in {config.out}" if (config.out / "checkpoint.pt").is_file() else "anew"
        return interrupted(f"interrupted; the same command goes on {saved}")
    return 0
