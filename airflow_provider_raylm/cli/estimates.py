"""From a sample of rows to what all of them take: figures with a range, and where the range comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev

from airflow_provider_raylm.specs.previews import PreviewReport

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Range:
    """A figure that lies between two others.

    Attributes:
        low: the least that is likely.
        high: the most.
        expected: what is likeliest; None where only the bounds are known.
    """

    low: float
    high: float
    expected: float | None = None

    def times(self, factor: float) -> Range:
        """Return the range of so many times the figure."""
        expected = None if self.expected is None else self.expected * factor
        return Range(self.low * factor, self.high * factor, expected)


def half_width(sample: Sequence[float], rows: int) -> float:
    """Return half of the confidence interval of a mean, as of a sample without replacement.

    ``z * s / sqrt(n) * sqrt((N - n) / (N - 1))``: z is 1.96 for 95 %, s the standard deviation of the sample, n its
    size, N the size of the whole. 0 when the sample is the whole; infinite for a sample of one.
    """
    count = len(sample)
    if count >= rows:
        return 0.0
    if count < 2:
        return math.inf
    return _Z * stdev(sample) / math.sqrt(count) * math.sqrt((rows - count) / (rows - 1))


def total(sample: Sequence[float], rows: int) -> Range:
    """Return the sum over *rows* rows, of which *sample* is a sample; it is no less than the sample's own."""
    middle, half = mean(sample), half_width(sample, rows)
    return Range(max(rows * (middle - half), sum(sample)), rows * (middle + half), rows * middle)


def engine_seconds(report: PreviewReport, rows: int) -> Range:
    """Return for how long the engine works on *rows* rows.

    At best, each row takes as long as in the sample and the engine always works on as many as it can: ``N * t / c``, t
    the mean of the rows' seconds, c the engine's capacity. At worst it continues as in the sample, which may have been
    too small to fill it: ``N * w / n``, w the sample's seconds, n its rows. Both are further apart by the half width of
    t, relative to t.
    """
    seconds = [one.seconds for one in report.counts]
    middle = mean(seconds)
    apart = half_width(seconds, rows) / middle if middle else 0.0
    pace = report.seconds / len(seconds)
    full = min(middle / report.capacity, pace)
    return Range(rows * full * max(1 - apart, 0.0), rows * pace * (1 + apart))
