"""How commands show what they found: a table on a terminal, tab-separated lines in a pipe, JSON where asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import msgspec
import rich_click as click

F = TypeVar("F", bound=Callable[..., Any])
Columns = Mapping[str, Callable[[Any], object]]
"""Heading → what of an entry is shown under it."""


def json_option(command: F) -> F:
    """The option `--json`, passed as `as_json`."""
    option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return option(command)


def show_list(entries: Sequence[Any], columns: Columns, *, as_json: bool) -> None:
    """Print many entries: `{"data": [...]}`, or one line each."""
    if as_json:
        print_json({"data": entries})
    else:
        table(list(columns), [[_text(pick(entry)) for pick in columns.values()] for entry in entries])


def show(entry: Any, *, as_json: bool, says: str | None = None) -> None:
    """Print one entry, as JSON or as a list of its fields, or in a sentence."""
    if as_json:
        print_json(entry)
    elif says is not None:
        click.echo(says)
    else:
        fields = list(_flat(entry))
        width = max(len(name) for name, _ in fields)
        for name, value in fields:
            click.echo(f"{name:<{width}}  " + _text(value).replace("\n", "\n" + " " * (width + 2)))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; in a pipe tab-separated lines without a heading."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    Console().print(shown)


def size(number: float) -> str:
    """Bytes for people: `269.0 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def moment(text: str | None) -> str:
    """The API's time in the reader's own zone, to the second."""
    if text is None:
        return ""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: int) -> str:
    """A whole number for people: `134,515,008`."""
    return f"{value:,}"


def _flat(entry: Any, prefix: str = "") -> Iterable[tuple[str, object]]:
    """The fields of an object, those of objects in it with a dotted name."""
    for name, value in entry.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: object) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "\n".join(str(entry) for entry in value)
    return str(value)
