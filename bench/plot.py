"""Draw what bench/gpu.py measured: python bench/plot.py bench/results/<device>/gpu.json"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

# told apart by colour-blind readers, and by their markers
STYLES = {
    "ours": ("#d55e00", "o"),
    "naive": ("#555555", "s"),
    "cuDNN, heads": ("#0072b2", "^"),
    "flash, heads": ("#009e73", "v"),
    "memory-efficient": ("#cc79a7", "D"),
    "FlexAttention": ("#56b4e9", "P"),
    "FlashAttention-3": ("#e69f00", "X"),
    "FlashAttention-4": ("#b8a000", "*"),
    "xFormers": ("#7b3294", "<"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """TFLOP/s over T: a panel for each M and direction, a line for each peer, the ceiling dashed. B = 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for cell in report["reads"].values():
        if "seconds" in cell and cell["B"] == 1 and cell["reader"] in STYLES and cell["dtype"] == report["dtype"]:
            lines[cell["direction"], cell["M"]][cell["reader"]].append((cell["T"], cell["tflops"]))
    directions = list(dict.fromkeys(direction for direction, _ in lines)) or ["forward"]
    frames = sorted({M for _, M in lines}) or [0]
    figure, panels = plt.subplots(
        len(directions),
        len(frames),
        figsize=(1.2 + 3.4 * len(frames), 1.2 + 2.9 * len(directions)),
        squeeze=False,
        sharey=True,
    )
    ceiling = report["ceilings"].get(f"matmul {report['dtype']}", {}).get("tflops")
    shown = {}
    for row, direction in zip(panels, directions):
        for panel, M in zip(row, frames):
            for reader, points in sorted(lines[direction, M].items(), key=lambda item: list(STYLES).index(item[0])):
                colour, marker = STYLES[reader]
                width = 2.4 if reader == "ours" else 1.3
                (shown[reader],) = panel.plot(
                    *zip(*sorted(points)), color=colour, marker=marker, markersize=5, linewidth=width
                )
            if ceiling:
                shown["large matrix product"] = panel.axhline(ceiling, color="black", linestyle="--", linewidth=1)
            panel.set_xscale("log")
            panel.set_title(f"{direction}, M = {M}", fontsize=10)
            panel.grid(alpha=0.25)
            ticks = sorted({T for points in lines[direction, M].values() for T, _ in points})
            panel.set_xticks(ticks, [str(T) for T in ticks])
            panel.minorticks_off()
        row[0].set_ylabel("useful TFLOP/s")
    for panel in panels[-1]:
        panel.set_xlabel("T, frames in the memory")
    panels[0][0].set_ylim(bottom=0)
    figure.suptitle(f"{report['machine']['device']}, {report['dtype']}, B = 1", fontsize=11)
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 2.2))
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=columns, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, (0.22 * -(-len(shown) // columns) + 0.15) / height, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the report")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    draw(report, arguments.out or arguments.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
