"""Tables and plots of what bench/long_video.py measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
# told apart by colour-blind readers, and by their markers
STYLES = {
    "naive": ("#555555", "s"),
    "everything kept": ("#d55e00", "o"),
    "fifo": ("#0072b2", "^"),
    "importance": ("#009e73", "v"),
    "host pages": ("#cc79a7", "D"),
}


def lines(report: dict[str, Any]) -> list[str]:
    """What is known, section by section."""
    tables: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "frames": _frame_lines,
        "append": _append_lines,
        "exact": _exact_lines,
        "host pages": _host_lines,
        "J": _score_lines,
        "run": _run_lines,
    }
    found = []
    for section, table in tables.items():
        results = report.get(section, {}).get("results", {})
        known = {name: cell for name, cell in results.items() if not {"failed", "skipped"} & set(cell)}
        found += [f"{section}, {name}: {cell.get('failed') or cell.get('skipped')}"
                  for name, cell in results.items() if name not in known]  # fmt: skip
        found += table(known) if known else []
    return found


def by_reader(cells: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each reader, over T."""
    ordered = sorted(cells.values(), key=lambda cell: cell["T"])
    found = {reader: [cell for cell in ordered if cell["reader"] == reader] for reader in STYLES}
    return {reader: row for reader, row in found.items() if row}


def _frame_lines(cells: dict[str, Any]) -> list[str]:
    readers = by_reader(cells)
    counts = sorted({cell["T"] for cell in cells.values()})
    found = []
    for title, value in (
        ("seconds a frame", lambda cell: f"{cell['seconds']:.4f}"),
        ("peak MiB", lambda cell: f"{cell['peak_bytes'] / MIB:.0f}"),
        ("frames in memory", lambda cell: f"{cell['frames_in_memory']}"),
    ):
        found.append(f"{title:18}" + "".join(f"{f'T={count}':>10}" for count in counts))
        for reader, row in readers.items():
            texts = {cell["T"]: value(cell) for cell in row}
            found.append(f"  {reader:16}" + "".join(f"{texts.get(count, ''):>10}" for count in counts))
    return found


def _append_lines(cells: dict[str, Any]) -> list[str]:
    found = [f"{'appending a frame':18}{'pages':>12}{'a new page':>12}{'torch.cat':>12}  seconds"]
    for row in cells["append"]["rows"]:
        found.append(f"  T={row['T']:<14}{row['pages']:12.6f}{row['pages_most']:12.6f}{row['cat']:12.6f}")
    return found


def _exact_lines(cells: dict[str, Any]) -> list[str]:
    found = []
    for name, cell in cells.items():
        ratios = ", ".join(f"{result} {ratio:.2f}" for result, ratio in cell["error_over_allowed"].items())
        found.append(f"{cell['T']} frames, {name}: error over the allowed one {ratios}")
    return found


def _host_lines(cells: dict[str, Any]) -> list[str]:
    cell = cells["host pages"]
    seconds = cell["seconds"]
    return [
        f"host pages, T={cell['T']}{', a dry run that means nothing' if cell['dry'] else ''}: {seconds['host']:.4f} s; "
        f"copy {seconds['copy']:.4f} s at {cell['copy_gigabytes_per_second']:.1f} GB/s, all on the device "
        f"{seconds['device']:.4f} s; {100 * cell['over_floor']:.1f} % over the larger of both"
    ]


def _score_lines(cells: dict[str, Any]) -> list[str]:
    found = [f"{'mean J':36}{'J':>8}{'most frames':>13}{'evicted':>9}"]
    for name, cell in cells.items():
        found.append(f"  {name:34}{cell['J']:8.4f}{cell['most_frames_in_memory']:13}{cell['evicted']:9}")
    return found


def _run_lines(cells: dict[str, Any]) -> list[str]:
    found = []
    for name, cell in cells.items():
        held, wall, processor = cell["held_bytes"], cell["frame_seconds"], cell["frame_processor_seconds"]
        early, late = cell["windows"]["early"], cell["windows"]["late"]
        found += [
            f"{name}, budget {cell['video']['budget']}, full after {cell['full_after_frames']} frames; frames "
            f"{early[0]} to {early[1]} against {late[0]} to {late[1]}:",
            f"  the process holds {held['early'] / MIB:.1f} and {held['late'] / MIB:.1f} MiB "
            f"({100 * cell['held_growth']:+.2f} %), "
            f"at most {held['most'] / MIB:.1f} ({100 * cell['most_growth']:+.2f} %)",
            f"  a frame takes {wall['early']:.4f} and {wall['late']:.4f} s, a factor of {cell['time_ratio']:.3f};",
            f"  on the processor {processor['early']:.4f} and {processor['late']:.4f} s, {cell['processor_ratio']:.3f}",
        ]
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the plots beside a JSON: over T, and over the frames of the long run."""
    from matplotlib.figure import Figure

    cells = [
        {name: cell for name, cell in report.get(section, {}).get("results", {}).items() if key in cell}
        for section, key in (("frames", "peak_bytes"), ("append", "rows"), ("run", "trace"))
    ]
    frames, append, run = cells
    if frames and append:
        figure = Figure((11, 3.7), layout="constrained")
        _draw_over_T(figure, frames, append["append"], report["machine"]["device"])
        figure.savefig(path.with_suffix(".png"), dpi=100)
    for cell in run.values():
        figure = Figure((7, 4.4), layout="constrained")
        _draw_run(figure, cell)
        figure.savefig(path.with_name(path.stem + "_run.png"), dpi=100)


def _draw_over_T(figure: Any, frames: dict[str, Any], append: dict[str, Any], device: str) -> None:
    """Time and memory of a frame, and of appending it, over T; both axes logarithmic."""
    seconds, memory, appended = figure.subplots(1, 3)
    for reader, row in by_reader(frames).items():
        colour, marker = STYLES[reader]
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
        counts = [cell["T"] for cell in row]
        seconds.plot(counts, [cell["seconds"] for cell in row], label=reader, **style)
        memory.plot(counts, [cell["peak_bytes"] / MIB for cell in row], **style)
    counts = [row["T"] for row in append["rows"]]
    for name, key, style in (
        ("torch.cat", "cat", STYLES["naive"]),
        ("pages", "pages", STYLES["everything kept"]),
    ):
        values = [1e3 * row[key] for row in append["rows"]]
        appended.plot(counts, values, label=name, color=style[0], marker=style[1], markersize=4, linewidth=1.4)
    titles = {seconds: "seconds a frame: append and read", memory: "peak memory, MiB", appended: "ms to append a frame"}
    for panel, title in titles.items():
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(title, fontsize=10)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        panel.set_xlabel("T, frames seen")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    appended.legend(fontsize=9, frameon=False)
    figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(device, fontsize=10)


def _draw_run(figure: Any, cell: dict[str, Any]) -> None:
    """What the process held, and what a frame took, over the frames of the run."""
    memory, seconds = figure.subplots(2, 1, sharex=True)
    places = [point["frame"] for point in cell["trace"]]
    memory.plot(places, [point["held_bytes"] / MIB for point in cell["trace"]], color="#d55e00")
    # other work on the machine stretches the time by the clock, and hardly that on the processor
    on_processor = cell["options"][-1] == "cpu"
    name = "processor_seconds" if on_processor else "seconds"
    seconds.plot(places, [point[name] for point in cell["trace"]], color="#0072b2")
    memory.set_ylabel("process, MiB")
    seconds.set_ylabel("processor seconds a frame" if on_processor else "seconds a frame")
    seconds.set_xlabel("frame")
    for panel in (memory, seconds):
        panel.set_ylim(0, 1.15 * panel.dataLim.y1)
        panel.axvline(cell["full_after_frames"], color="black", linestyle="--", linewidth=1)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    memory.set_title(f"budget of {cell['video']['budget']}, full at the dashed line", fontsize=10)
