"""How well the tracker's trust in its masks tells which masks are wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from stm_model.evaluation.scoring import ObjectScore
from stm_model.tracking.trust import UNTRUSTED

WRONG = 0.5
"""J below which a mask is wrong."""
FALL = 0.2
"""How far J is below the object's mean until then where it has fallen."""


def certainty_scores(scores: Sequence[ObjectScore], folder: Path) -> dict[str, Any]:
    """Area under ROC of the trust, and precision and recall of what is flagged as lost, over masks of all frames.

    Args:
        scores: of the objects.
        folder: holds VIDEO.json: label → frame → trust, as `track_videos` writes it.

    Returns:
        For masks with a J below 0.5 (`wrong`), and 0.2 below the object's mean until then (`fallen`), each a dict of
        `count`, `auc`, `precision` and `recall`; what has no value is None.
    """
    found: list[tuple[float, bool, bool]] = []
    for score in scores:
        path = folder / f"{score.video}.json"
        known = json.loads(path.read_text()).get(str(score.label), {}) if path.is_file() else {}
        for place, (frame, region) in enumerate(zip(score.frames, score.region)):
            if str(frame) in known:
                before = np.mean(score.region[:place]) if place else region
                found.append((known[str(frame)], region < WRONG, region <= before - FALL))
    trust, *kinds = np.array(found, dtype=float).reshape(-1, 3).T
    named = zip(("wrong", "fallen"), (kind > 0 for kind in kinds))
    return {"masks": len(found), **{name: _told(trust, positive) for name, positive in named}}


def _told(trust: np.ndarray, positive: np.ndarray) -> dict[str, float | int | None]:
    low, high, flagged = trust[positive], trust[~positive], trust < UNTRUSTED
    # the chance that a right mask is trusted more than a wrong one
    area = mannwhitneyu(high, low).statistic / (len(high) * len(low)) if len(high) and len(low) else None
    both = int((positive & flagged).sum())
    return {
        "count": len(low),
        "auc": area,
        "precision": both / int(flagged.sum()) if flagged.any() else None,
        "recall": both / len(low) if len(low) else None,
    }
