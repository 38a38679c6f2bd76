"""Reads single gauges and counters out of a Prometheus text exposition.

Of the hundreds of lines of vLLM's `/metrics` Greenroom needs a few, so this looks for those instead of building objects
for all.
"""

from __future__ import annotations


def total(exposition: str, metric: str) -> float | None:
    """The sum of a metric's samples over all its labels; `None` if there is no sample.

    `metric` is the full sample name (counters end in `_total`). Comments, exemplars and time stamps are skipped.
    Raises `ValueError` for a sample whose value is no number.
    """
    values = [_value(line, metric) for line in exposition.splitlines() if _is_sample(line, metric)]
    return sum(values) if values else None


def _is_sample(line: str, metric: str) -> bool:
    return line.startswith(metric) and line[len(metric) : len(metric) + 1] in {"{", " ", "\t"}


def _value(line: str, metric: str) -> float:
    rest = line[len(metric) :]
    if rest.startswith("{"):
        rest = rest[_labels_end(rest) :]
    value, *_ = rest.split(maxsplit=1) or [""]
    return float(value)


def _labels_end(text: str) -> int:
    """Where a `{…}` at the start of `text` is over; label values may hold braces, quotes are escaped by a backslash."""
    quoted = escaped = False
    for index, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = quoted
        elif character == '"':
            quoted = not quoted
        elif character == "}" and not quoted:
            return index + 1
    raise ValueError(f"labels without an end: {text[:80]}")
