"""SAM 2's masks as run lengths in JSON: of its generator, of SA-1B and SA-V, and by frame and object."""

from functools import partial
from typing import Any

from stm_model.io.formats.rle import decode_segmentation
from stm_model.io.formats.shapes import Frame, Shape


def read_sam(content: Any) -> list[Frame]:
    """Frames of a list of masks (one frame, as the automatic generator returns with `coco_rle` and SA-1B has them), of
    SA-V's masklets, or of `{frame: {object: run lengths}}`. Raises a ValueError for anything else.
    """
    if isinstance(content, dict) and "masklet" in content:
        masklets = content["masklet"]
        # annotated in every fourth frame
        step = max(1, round(float(content.get("video_frame_count", 0)) / max(1, len(masklets))))
        numbers = [int(each) + 1 for each in content.get("masklet_id", ())]
        return [
            _frame(place * step, dict(zip(numbers or range(1, len(runs) + 1), runs)))
            for place, runs in enumerate(masklets)
            if any(runs)
        ]
    if isinstance(content, dict) and "annotations" in content:
        content = content["annotations"]
    if isinstance(content, list) and content:
        # small ones lie on large ones
        numbered = sorted(enumerate(content, 1), key=lambda each: -(each[1].get("area") or 0))
        return [_frame(0, {number: found["segmentation"] for number, found in numbered})]
    if isinstance(content, dict) and content and all(str(key).isdigit() for key in content):
        return [_frame(int(key), objects) for key, objects in content.items() if objects]
    raise ValueError("expected LabelMe's, COCO's, YouTube-VIS' or SAM 2's JSON")


def _frame(index: int, objects: dict[Any, dict]) -> Frame:
    height, width = next(runs["size"] for runs in objects.values() if runs)
    size = int(height), int(width)
    shapes = [Shape(str(name), partial(decode_segmentation, runs, size)) for name, runs in objects.items() if runs]
    return Frame(index, size, shapes)
