"""An evaluation as one HTML page that needs no network, as pictures and as overlay videos."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stm_model.evaluation import figures
from stm_model.evaluation.protocol import Dataset, Video
from stm_model.evaluation.scoring import find_results, read_result
from stm_model.evaluation.tables import Evaluation, mean_region, quoted_results
from stm_model.io.files import whole
from stm_model.io.images import contact_sheet, encode_jpeg, overlay, read_image, resize_frame, write_image
from stm_model.progress import Progress

TEMPLATES = Path(__file__).parent / "templates"
WORST_FRAMES = 6
SHEET_VIDEOS, SHEET_FRAMES = 12, 4
PANEL_WIDTH = 320
"""Width of one picture in the page, in pixels."""


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write an HTML page from a jinja2 template, whole or not at all; it may extend `base.html`. Values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, TEMPLATES])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    with whole(path) as partial:
        partial.write_text(pages.get_template(template.name).render(values), encoding="utf-8")


def png_url(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(evaluation: Evaluation, out: Path, overlays: Mapping[str, Path], binary: bool) -> None:
    """Write report.html, which holds all its pictures and links `overlays`, and the pictures again under figures/."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    dataset, summary = evaluation.dataset, evaluation.summary
    page: dict[str, Any] = {"facts": _facts(evaluation), "scores": [], "timed": evaluation.speed is not None}
    if evaluation.scores:
        page |= _score_table(evaluation)
        page |= {"charts": _charts(evaluation, folder), "error_colors": figures.ERROR_COLORS}
        page |= {"worst": _worst(evaluation, folder, binary)}
        page |= {"certainty": summary["certainty"], "corrections": summary.get("corrections", [])}
    page |= _sheet(evaluation, folder, binary)
    write_page(
        out / "report.html",
        TEMPLATES / "evaluation.html",
        title=f"{dataset.name}, split {dataset.split}",
        command=summary["command"],
        versions=summary["versions"],
        overlays={name: path.relative_to(out).as_posix() for name, path in overlays.items()},
        **page,
    )


def write_overlays(dataset: Dataset, masks: Path, out: Path, binary: bool) -> dict[str, Path]:
    """Write OUT/VIDEO.mp4 for every video, the frames that have a mask with the objects colored; video → file."""
    # only here: evaluating without --overlay must not need PyAV
    from stm_model.io.video import VideoWriter

    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for video in Progress(dataset.videos, desc="overlay", unit="video", leave=False):
        folder = find_results(dataset, masks, video)
        files[video.name] = out / f"{video.name}.mp4"
        with VideoWriter(files[video.name]) as writer:
            for frame in video.asked:
                path = folder / video.mask_name(frame)
                if path.is_file():
                    pixels = read_image(video.frame_paths[frame])
                    writer.write(overlay(pixels, read_result(path, video, pixels.shape[:2], binary)))
    return files


def _facts(evaluation: Evaluation) -> list[str]:
    videos, speed = evaluation.dataset.videos, evaluation.speed
    frames = sum(len(video.frame_paths) for video in videos)
    facts = [f"{len(videos)} videos, {frames} frames, {sum(len(video.objects) for video in videos)} objects"]
    if speed:
        where = "{device}, {threads} CPU threads, {dtype}".format_map(evaluation.summary)
        facts.append(f"{speed.fps:.2f} frames a second ({where})")
        if speed.peak_bytes:
            facts.append(f"peak memory {speed.peak_bytes / 2**20:.0f} MiB")
    return facts


def _score_table(evaluation: Evaluation) -> dict[str, Any]:
    """Rows for what was measured and for published results that share a column with it."""
    columns = list(evaluation.summary["scores"])
    rows = [
        ("ours", "tracked" if evaluation.speed else "results", evaluation.summary["scores"]),
        ("", "first mask repeated", evaluation.summary["floor"]),
    ]
    quoted = [row for row in quoted_results(evaluation.dataset.name) if set(row.values) & set(columns)]
    sources = list(dict.fromkeys(row.source for row in quoted))
    for row in quoted:
        rows.append(("quoted", f"{row.system}, quoted [{sources.index(row.source) + 1}]", row.values))
    return {"columns": columns, "scores": rows, "sources": sources}


def _charts(evaluation: Evaluation, folder: Path) -> list[tuple[str, str, str]]:
    """(heading, picture, caption) of every chart."""
    scores, videos = evaluation.scores, evaluation.dataset.videos
    floor = {
        video.name: mean_region(own)
        for video in videos
        if (own := [score for score in evaluation.floor if score.video == video.name])
    }
    figures.draw_bars(scores, floor, folder / "videos.png")
    figures.draw_over_time(scores, folder / "over_time.png")
    charts = [
        ("Video by video", "videos.png", "J and F of every video"),
        ("Over time", "over_time.png", "J by frame, the lowest video first"),
    ]
    return [(heading, png_url(folder / name), caption) for heading, name, caption in charts]


def _worst(evaluation: Evaluation, folder: Path, binary: bool) -> list[tuple[str, list[str]]]:
    """(caption, pictures) of the worst frame of the worst videos."""
    worst: dict[str, tuple[float, int, int]] = {}
    for score in evaluation.scores:
        region, frame = min(zip(score.region, score.frames))
        worst[score.video] = min(worst.get(score.video, (2.0, 0, 0)), (region, frame, score.label))
    videos = {video.name: video for video in evaluation.dataset.videos}
    captions, views = [], []
    for name, (region, frame, label) in sorted(worst.items(), key=lambda item: item[1])[:WORST_FRAMES]:
        which = f", object {label}" if len(videos[name].objects) > 1 else ""
        captions.append(f"{name}, frame {videos[name].frame_paths[frame].stem}{which}: J {region:.3f}")
        views.append(_views(evaluation, videos[name], frame, binary))
    write_image(folder / "worst.png", contact_sheet([view for tile in views for view in tile], columns=3))
    return [(caption, [_jpeg_url(view) for view in tile]) for caption, tile in zip(captions, views)]


def _views(evaluation: Evaluation, video: Video, frame: int, binary: bool) -> list[np.ndarray]:
    """Ground truth, prediction and errors of a frame."""
    truth = video.read_annotation(frame)
    pixels = read_image(video.frame_paths[frame])
    if pixels.shape[:2] != truth.shape:
        pixels = resize_frame(pixels, truth.shape)
    path = find_results(evaluation.dataset, evaluation.masks, video) / video.mask_name(frame)
    prediction = read_result(path, video, truth.shape, binary)
    views = [overlay(pixels, truth), overlay(pixels, prediction), figures.error_map(pixels, prediction, truth)]
    return [narrow(view, PANEL_WIDTH) for view in views]


def _sheet(evaluation: Evaluation, folder: Path, binary: bool) -> dict[str, str]:
    """Frames spread over the videos, one row a video, and the caption."""
    videos = evaluation.dataset.videos[:SHEET_VIDEOS]
    pictures = []
    for video in videos:
        found = find_results(evaluation.dataset, evaluation.masks, video)
        there = [frame for frame in video.asked if (found / video.mask_name(frame)).is_file()]
        for place in np.linspace(0, len(there) - 1, SHEET_FRAMES).round().astype(int):
            pixels = read_image(video.frame_paths[there[place]])
            labels = read_result(found / video.mask_name(there[place]), video, pixels.shape[:2], binary)
            pictures.append(narrow(overlay(pixels, labels), PANEL_WIDTH * 3 // 4))
    sheet = contact_sheet(pictures, columns=SHEET_FRAMES)
    write_image(folder / "contact_sheet.png", sheet)
    caption = "predictions from the first frame to the last: " + ", ".join(video.name for video in videos)
    if len(videos) < len(evaluation.dataset.videos):
        caption += f", the first {len(videos)} of {len(evaluation.dataset.videos)} videos"
    return {"sheet": _jpeg_url(sheet), "sheet_caption": caption}


def narrow(image: np.ndarray, width: int) -> np.ndarray:
    """An image that is wider than `width` pixels, shrunk to it."""
    if image.shape[1] <= width:
        return image
    return resize_frame(image, (max(1, round(image.shape[0] * width / image.shape[1])), width))


def _jpeg_url(image: np.ndarray) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(image)).decode()}"
