"""What a load test measured, from raw samples: exact percentiles, where Locust's own are rounded to two digits.

    TTFT        first token − start                        what the server did
    TTFT+late   first token − due time                     what a user felt: a start that was late counts
    ITL         (last − first) ÷ (tokens − 1), per stream  as guidellm and aiperf define it; not TPOT
    ICL         gaps between chunks, of all streams        its maximum shows stalls that ITL averages away
    E2E         [DONE] − start
    late        start − due time                           grows when all users are busy: add users, or it is the server
    goodput     streams per second within both targets, TTFT+late and ITL

Times of streams that failed are left out; failures are counted by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from loadtests.sse import Stream

ROWS = ("TTFT", "TTFT+late", "ITL", "ICL", "E2E", "late")


class Sample(Struct, frozen=True, kw_only=True):
    """One request. Times are in seconds, `started` and `ended` since the test's start."""

    started: float
    ended: float
    late_s: float
    failure: str | None = None
    tokens: int = 0
    first_token_s: float | None = None
    inter_token_s: float | None = None
    gaps_s: tuple[float, ...] = ()


def sample(stream: Stream, *, due: float, start: float, zero: float) -> Sample:
    """The sample of a stream that was read to its end; all times on one clock, `zero` is the test's start."""
    ended = stream.ended if stream.ended is not None else start
    return Sample(
        started=start - zero,
        ended=ended - zero,
        late_s=max(0.0, start - due),
        failure=stream.failure,
        tokens=stream.completion_tokens,
        first_token_s=stream.first_token_s(start),
        inter_token_s=stream.inter_token_s(),
        gaps_s=tuple(stream.gaps_s()),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` % of the values don't exceed (nearest rank); `None` without values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Report:
    """Collects samples; in a distributed test the workers' (`drain`) are added to the master's (`extend`)."""

    def __init__(self, *, target_first_token_s: float, target_inter_token_s: float) -> None:
        """The targets are what a stream must keep to count as goodput."""
        self._targets = (target_first_token_s, target_inter_token_s)
        self._samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """One request has ended."""
        self._samples.append(sample)

    def drain(self) -> list[dict[str, Any]]:
        """All samples as plain data; they are this report's no more."""
        taken, self._samples = self._samples, []
        return [msgspec.to_builtins(sample) for sample in taken]

    def extend(self, samples: Iterable[dict[str, Any]]) -> None:
        """Take over what another report has drained."""
        self._samples += [msgspec.convert(sample, Sample) for sample in samples]

    def summary(self) -> dict[str, Any]:
        """Everything as one JSON object; times in milliseconds."""
        samples = self._samples
        good = [sample for sample in samples if sample.failure is None]
        span_s = max((s.ended for s in samples), default=0.0) - min((s.started for s in samples), default=0.0)
        per_second = 1 / span_s if span_s > 0 else 0.0
        kept = [sample for sample in good if self._within_targets(sample)]
        return {
            "requests": len(samples),
            "failures": len(samples) - len(good),
            "failures_by_reason": dict(Counter(s.failure for s in samples if s.failure is not None)),
            "span_s": round(span_s, 3),
            "requests_per_s": round(len(samples) * per_second, 3),
            "tokens": sum(sample.tokens for sample in good),
            "tokens_per_s": round(sum(sample.tokens for sample in good) * per_second, 3),
            "targets_ms": {"TTFT+late": self._targets[0] * 1000, "ITL": self._targets[1] * 1000},
            "goodput_per_s": round(len(kept) * per_second, 3),
            "goodput_share": round(len(kept) / len(samples), 4) if samples else None,
            "ms": {row: _spread(_values(row, good)) for row in ROWS},
        }

    def _within_targets(self, sample: Sample) -> bool:
        first = sample.first_token_s
        if first is None or first + sample.late_s > self._targets[0]:
            return False
        return sample.inter_token_s is None or sample.inter_token_s <= self._targets[1]


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{'ms':<10}{'n':>8}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    for row, spread in summary["ms"].items():
        cells = "".join(f"{'-' if spread[key] is None else format(spread[key], '.1f'):>10}" for key in _KEYS)
        lines.append(f"{row:<10}{spread['n']:>8}{cells}")
    targets = summary["targets_ms"]
    lines.append(
        f"{summary['requests']} requests in {summary['span_s']} s, {summary['failures']} failed; "
        f"{summary['tokens']} tokens, {summary['tokens_per_s']} a second; "
        f"goodput {summary['goodput_per_s']} a second (TTFT+late ≤ {targets['TTFT+late']:.0f} ms, "
        f"ITL ≤ {targets['ITL']:.0f} ms)"
    )
    lines += [f"  failed: {count} × {reason}" for reason, count in summary["failures_by_reason"].items()]
    return "\n".join(lines)


_KEYS = ("p50", "p90", "p99", "max")


def _values(row: str, samples: Sequence[Sample]) -> list[float]:
    if row == "ICL":
        return [gap for sample in samples for gap in sample.gaps_s]
    if row == "TTFT+late":
        return [sample.first_token_s + sample.late_s for sample in samples if sample.first_token_s is not None]
    if row == "E2E":
        return [sample.ended - sample.started for sample in samples]
    if row == "late":
        return [sample.late_s for sample in samples]
    values = (sample.first_token_s if row == "TTFT" else sample.inter_token_s for sample in samples)
    return [value for value in values if value is not None]


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    ms = [value * 1000 for value in values]
    numbers = {
        "p50": percentile(ms, 50),
        "p90": percentile(ms, 90),
        "p99": percentile(ms, 99),
        "max": max(ms, default=None),
    }
    return {"n": len(ms), **{key: None if value is None else round(value, 3) for key, value in numbers.items()}}
