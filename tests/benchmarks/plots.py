"""Pictures of a benchmark's results, as docs/performance.md shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # after the backend is chosen: there is no screen here
from matplotlib.axes import Axes

OURS, OTHERS = "#3060a0", "#b0b0b0"


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the results have: contenders side by side, and rows/s against the window; return the files."""
    drawn = []
    rates = {name: _rates(result) for name, result in results.items() if name != "concurrency"}
    compared = {name: of for name, of in rates.items() if len(of) > 1 and "ours" in of}
    if compared:
        drawn.append(_throughput(compared, folder / "throughput.png"))
    if "concurrency" in results:
        drawn.append(_concurrency(_rates(results["concurrency"]), folder / "concurrency.png"))
    return drawn


def _rates(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: values["rows_per_s"] for name, values in result["contenders"].items() if "rows_per_s" in values}


def _throughput(rates: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    figure, axes = pyplot.subplots(
        len(rates),
        squeeze=False,
        figsize=(7, sum(0.7 + 0.3 * len(of) for of in rates.values())),
        height_ratios=[1 + len(of) for of in rates.values()],
    )
    for (name, of), place in zip(rates.items(), axes[:, 0], strict=True):
        bars = place.barh(list(of), list(of.values()), color=[OURS if c == "ours" else OTHERS for c in of])
        place.bar_label(bars, fmt="%.0f", padding=3)
        place.invert_yaxis()
        place.set_title(f"{name}: rows/s, first to last row", fontsize=10, loc="left")
        place.margins(x=0.12)
        _plain(place)
    return _save(figure, path)


def _concurrency(rates: Mapping[str, float], path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    windows, tasks = (
        {int(name.removeprefix(kind)): rate for name, rate in rates.items() if name.startswith(kind)}
        for kind in ("window_", "tasks_")
    )
    axes.plot(list(windows), list(windows.values()), marker="o", color=OURS, label="one task, blocks of 64 rows")
    for style, (number, rate) in zip(("--", ":"), tasks.items(), strict=True):
        axes.axhline(rate, linestyle=style, color="#606060", label=f"{number} at a time, default window")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows in flight at a time (in_flight_rows)")
    axes.set_ylabel("rows/s")
    axes.legend(frameon=False)
    _plain(axes)
    return _save(figure, path)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
