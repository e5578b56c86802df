"""The network: frames and masks in, probabilities out; no video, no files."""

from stm_model.network.aggregate import aggregated, other_object_masks, soft_aggregate
from stm_model.network.batch_norm import fold_batch_norm
from stm_model.network.inference import for_inference
from stm_model.network.stm import STM, STRIDE, Query, STMConfig, as_positions, scribble_tensors

__all__ = [
    "STM",
    "STRIDE",
    "Query",
    "STMConfig",
    "aggregated",
    "as_positions",
    "fold_batch_norm",
    "for_inference",
    "other_object_masks",
    "scribble_tensors",
    "soft_aggregate",
]
