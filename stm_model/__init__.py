"""STM video object segmentation: the network, the tracker, training, evaluation and the `stm` command."""

__all__ = ["STM", "STMConfig", "Tracker"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("STM", "STMConfig"):
        from stm_model import network

        return getattr(network, name)
    if name == "Tracker":
        from stm_model.tracking.tracker import Tracker

        return Tracker
    raise AttributeError(f"module 'stm_model' has no attribute {name!r}")
