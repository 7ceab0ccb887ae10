"""Pictures of a benchmark's results, as docs/performance.md shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # after the backend is chosen: there is no screen here


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw one picture per kind of result that is there; return the files."""
    drawn = []
    for name, result in results.items():
        rates = {c: v["rows_per_s"] for c, v in result["contenders"].items() if "rows_per_s" in v}
        if len(rates) > 1:
            drawn.append(_bars(name, rates, folder / f"{name}.png"))
    return drawn


def _bars(name: str, rates: Mapping[str, float], path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(6, 0.6 + 0.45 * len(rates)))
    bars = axes.barh(
        list(rates),
        list(rates.values()),
        color=["#3060a0" if c.startswith(("ours", "window")) else "#b0b0b0" for c in rates],
    )
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows/s, first to last row")
    axes.set_title(name)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
