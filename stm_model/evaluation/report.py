"""An evaluation as one HTML page that needs no network, and as pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from stm_model.evaluation import figures
from stm_model.evaluation.protocol import Video
from stm_model.evaluation.scoring import ObjectScore, find_results, read_result
from stm_model.evaluation.tables import QUOTED, Evaluation, mean_region
from stm_model.io.images import contact_sheet, overlay, read_image, resize_frame, write_image

WORST_FRAMES = 6
SHEET_VIDEOS, SHEET_FRAMES = 12, 4
PANEL_WIDTH = 320
"""Width of one picture in the page, in pixels."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
img { max-width: 100%; height: auto; display: block; background: #fff }
.row { display: flex; flex-wrap: wrap; gap: 4px } .row img:not(:only-child) { flex: 1 1 15rem; min-width: 0 }
figure { margin: 0 0 1.4rem }
figcaption, .note { color: #666; font-size: .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.ours td { font-weight: 600 } tr.quoted td { color: #666 }
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .9em; vertical-align: -.1em }
code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } figcaption, .note, tr.quoted td { color: #999 }
  th, td { border-color: #444 } a { color: #8ab4f8 }
}
"""


class _Tile(NamedTuple):
    """One frame in three views: ground truth, prediction, errors."""

    caption: str
    views: list[np.ndarray]


def write_report(evaluation: Evaluation, out: Path, overlays: Mapping[str, Path], binary: bool) -> None:
    """Write report.html, which holds all its pictures, and the pictures again as files under figures/.

    Args:
        evaluation: what to show.
        out: folder for both.
        overlays: video → overlay video, to be linked.
        binary: the masks are black and white.
    """
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_head(evaluation), _score_table(evaluation)]
    if evaluation.scores:
        sections += _drawn(evaluation, folder)
        sections += _worst(evaluation, folder, binary)
    sections += [_sheet(evaluation, folder, binary), _links(overlays, out), _origin(evaluation)]
    title = f"{evaluation.dataset.name}, {evaluation.dataset.split}"
    partial = out / ".report.partial.html"
    partial.write_text(page(title, sections), encoding="utf-8")
    partial.replace(out / "report.html")


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def picture(path: Path, caption: str) -> str:
    """A picture that lies in the page, with what it shows."""
    return _figure([_data_url(path)], caption)


def _head(evaluation: Evaluation) -> str:
    dataset, speed = evaluation.dataset, evaluation.speed
    frames = sum(len(video.frame_paths) for video in dataset.videos)
    objects = sum(len(video.objects) for video in dataset.videos)
    parts = [f"{len(dataset.videos)} videos, {frames} frames, {objects} objects"]
    if speed:
        where = "{device}, {threads} CPU threads, {dtype}".format_map(evaluation.summary)
        parts.append(f"{speed.fps:.2f} frames a second ({where})")
        if speed.peak_bytes:
            parts.append(f"peak memory {speed.peak_bytes / 2**20:.0f} MiB")
    heading = f"<h1>{html.escape(dataset.name)}, split {html.escape(dataset.split)}</h1>"
    return f"{heading}<p>{html.escape('; '.join(parts))}.</p>"


def _score_table(evaluation: Evaluation) -> str:
    if not evaluation.scores:
        return "<p>The ground truth of this split is not here: the masks are written, to be submitted.</p>"
    columns = list(evaluation.summary["scores"])
    name = "tracked" if evaluation.speed else "results"
    rows = [("ours", name, evaluation.summary["scores"]), ("", "first mask repeated", evaluation.summary["floor"])]
    quoted = [row for row in QUOTED if row.dataset == evaluation.dataset.name and set(row.values) & set(columns)]
    rows += [("quoted", f"{row.system}, quoted [{_number(row.source, quoted)}]", row.values) for row in quoted]
    lines = [
        f'<tr class="{kind}"><td>{html.escape(label)}</td>'
        + "".join(f"<td>{values[column]:.3f}</td>" if column in values else "<td></td>" for column in columns)
        + "</tr>"
        for kind, label, values in rows
    ]
    header = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    table = f'<div class="wide"><table><tr><th></th>{header}</tr>{"".join(lines)}</table></div>'
    sources = dict.fromkeys(row.source for row in quoted)
    note = "; ".join(f"[{_number(source, quoted)}] {source}" for source in sources)
    if note:
        note = (
            '<p class="note">Quoted rows are as published, with networks and training data of their own, and not on '
            f"this split unless it is the benchmark's; none was measured here. {html.escape(note)}.</p>"
        )
    return f"<h2>Scores</h2>{table}{note}"


def _number(source: str, quoted: Sequence) -> int:
    return list(dict.fromkeys(row.source for row in quoted)).index(source) + 1


def _drawn(evaluation: Evaluation, folder: Path) -> list[str]:
    scores = evaluation.scores
    floor: dict[str, float] = {}
    for video in evaluation.dataset.videos:
        if own := [score for score in evaluation.floor if score.video == video.name]:
            floor[video.name] = mean_region(own)
    figures.draw_bars(scores, floor, folder / "videos.png")
    figures.draw_over_time(scores, folder / "over_time.png")
    sections = [
        f"<h2>Video by video</h2>{picture(folder / 'videos.png', 'J and F of every video')}",
        f"<h2>Over time</h2>{picture(folder / 'over_time.png', 'J by frame, the lowest video first')}",
    ]
    if attributes := attribute_means(evaluation.dataset.videos, scores):
        figures.draw_attributes(attributes, folder / "attributes.png")
        caption = "mean J of the videos that have an attribute, in the dataset's words"
        sections.append(f"<h2>Attributes</h2>{picture(folder / 'attributes.png', caption)}")
    return sections


def attribute_means(videos: Iterable[Video], scores: Sequence[ObjectScore]) -> dict[str, tuple[float, int]]:
    """Attribute → mean J over the videos that have it, and their number."""
    members: dict[str, list[float]] = {}
    for video in videos:
        if own := [score for score in scores if score.video == video.name]:
            for attribute in video.attributes:
                members.setdefault(attribute, []).append(mean_region(own))
    return {attribute: (fmean(values), len(values)) for attribute, values in sorted(members.items())}


def _worst(evaluation: Evaluation, folder: Path, binary: bool) -> list[str]:
    """The worst frame of the worst objects, one a video."""
    worst: dict[str, tuple[float, int, int]] = {}
    for score in evaluation.scores:
        region, frame = min(zip(score.region, score.frames))
        worst[score.video] = min(worst.get(score.video, (2.0, 0, 0)), (region, frame, score.label))
    videos = {video.name: video for video in evaluation.dataset.videos}
    tiles = []
    for name, (region, frame, label) in sorted(worst.items(), key=lambda item: item[1])[:WORST_FRAMES]:
        which = f", object {label}" if len(videos[name].objects) > 1 else ""
        caption = f"{name}, frame {videos[name].frame_paths[frame].stem}{which}: J {region:.3f}"
        views = _views(evaluation, videos[name], frame, binary)
        tiles.append(_Tile(caption, views))
    write_image(folder / "worst.png", contact_sheet([view for tile in tiles for view in tile.views], columns=3))
    key = "".join(
        f'<span style="background: rgb{colour}"></span>{meaning}'
        for colour, meaning in (
            (figures.FALSE_POSITIVE, "seen, not there"),
            (figures.FALSE_NEGATIVE, "there, not seen"),
            (figures.CONFUSED, "another object"),
        )
    )
    shown = [_figure([_jpeg(view) for view in tile.views], tile.caption) for tile in tiles]
    return [
        "<h2>Worst frames</h2>",
        f'<p class="key">Each with ground truth, prediction and errors:{key}</p>',
        *shown,
    ]


def _views(evaluation: Evaluation, video: Video, frame: int, binary: bool) -> list[np.ndarray]:
    truth = video.read_annotation(frame)
    pixels = read_image(video.frame_paths[frame])
    if pixels.shape[:2] != truth.shape:
        pixels = resize_frame(pixels, truth.shape)
    path = find_results(evaluation.dataset, evaluation.masks, video) / video.mask_name(frame)
    prediction = read_result(path, video, truth.shape, binary)
    views = [overlay(pixels, truth), overlay(pixels, prediction), figures.error_map(pixels, prediction, truth)]
    return [_narrow(view, PANEL_WIDTH) for view in views]


def _sheet(evaluation: Evaluation, folder: Path, binary: bool) -> str:
    """Frames spread over the videos, one row a video."""
    videos = evaluation.dataset.videos[:SHEET_VIDEOS]
    pictures = []
    for video in videos:
        found = find_results(evaluation.dataset, evaluation.masks, video)
        there = [frame for frame in video.asked if (found / video.mask_name(frame)).is_file()]
        for place in np.linspace(0, len(there) - 1, SHEET_FRAMES).round().astype(int):
            pixels = read_image(video.frame_paths[there[place]])
            labels = read_result(found / video.mask_name(there[place]), video, pixels.shape[:2], binary)
            pictures.append(_narrow(overlay(pixels, labels), PANEL_WIDTH * 3 // 4))
    sheet = contact_sheet(pictures, columns=SHEET_FRAMES)
    write_image(folder / "contact_sheet.png", sheet)
    rest = (
        f", the first {len(videos)} of {len(evaluation.dataset.videos)} videos"
        if len(videos) < len(evaluation.dataset.videos)
        else ""
    )
    caption = "predictions from the first frame to the last: " + ", ".join(video.name for video in videos) + rest
    return "<h2>Contact sheet</h2>" + _figure([_jpeg(sheet)], caption)


def _links(overlays: Mapping[str, Path], out: Path) -> str:
    if not overlays:
        return ""
    links = "".join(
        f'<li><a href="{html.escape(path.relative_to(out).as_posix())}">{html.escape(name)}</a></li>'
        for name, path in overlays.items()
    )
    return f"<h2>Overlay videos</h2><ul>{links}</ul>"


def _origin(evaluation: Evaluation) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.summary["versions"].items())
    command = html.escape(evaluation.summary["command"])
    how = "Frames over seconds of tracking; reading and writing files is not counted." if evaluation.speed else ""
    return f"<h2>Where this comes from</h2><p><code>{command}</code></p><p>{html.escape(versions)}. {how}</p>"


def _narrow(image: np.ndarray, width: int) -> np.ndarray:
    if image.shape[1] <= width:
        return image
    return resize_frame(image, (max(1, round(image.shape[0] * width / image.shape[1])), width))


def _jpeg(image: np.ndarray) -> str:
    """A picture as a data URL."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        write_image(path, image)
        return _data_url(path)


def _data_url(path: Path) -> str:
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _figure(urls: Sequence[str], caption: str) -> str:
    """Pictures side by side as far as the page is wide, and what they show."""
    text = html.escape(caption)
    shown = "".join(f'<img alt="{text}" src="{url}">' for url in urls)
    return f'<figure><div class="row">{shown}</div><figcaption>{text}</figcaption></figure>'
