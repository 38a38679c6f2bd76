"""`greenroom models`: what variants can be made of. Adding happens here, beside the store; the rest asks the API."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from msgspec import Struct

from app.cli import http, settings
from app.cli.output import Columns, json_option, moment, number, show, show_list, size
from app.refusal import Refused
from app.settings import Settings
from engines import conversion, footprint, modelstore
from engines.model import Model, Name, RuntimeArguments

Report = Callable[[str, int, int], None]
"""What is being done, how much of it, and of how much: bytes, or steps where there are no bytes."""

_COLUMNS: Columns = {
    "name": lambda model: model["name"],
    "architecture": lambda model: model["architecture"],
    "dtype": lambda model: model["dtype"],
    "parameters": lambda model: number(model["parameters"]),
    "weights": lambda model: size(model["weights_bytes"]),
    "context": lambda model: number(model["max_model_len"]),
    "digest": lambda model: model["digest"][:12],
    "added": lambda model: moment(model["created_at"]),
}


class Added(Struct, frozen=True):
    """A model that is in the store and registered."""

    registered: dict[str, Any]
    """The admin API's answer."""
    model: Model
    warnings: tuple[str, ...]


async def add_model(
    admin: http.AdminClient, tree: Settings, name: str, path: Path, *, source: str | None = None, report: Report
) -> Added:
    """Check a Hugging Face folder or a GGUF file, copy it into this machine's store and register it as `name`.

    Doing it again changes nothing. `report` is called from other threads too. Raises `ModelInvalid` with one line that
    names the file, `Refused` if the API says no, `OSError` if the disk is too small.
    """
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        reason = (
            "a model's name has 1 to 64 characters of a-z, 0-9, `.`, `_`, `-` and begins and ends with one of a-z, 0-9"
        )
        raise Refused(f"{name!r}: {reason}") from None
    said = source or str(path.absolute())
    if not (path.suffix.lower() == ".gguf" and path.is_file()):
        return await _add_folder(admin, tree.models_path, name, path, source=said, report=report)
    with modelstore.incoming(tree.models_path) as workshop:
        folder = workshop / "converted"
        report(f"converting {path.name}", 0, 1)
        await conversion.convert(
            tree.engine_python, path, folder, lambda step: report(f"{step.says}", max(0, step.number - 1), step.of)
        )
        return await _add_folder(admin, tree.models_path, name, folder, source=said, report=report)


async def _add_folder(
    admin: http.AdminClient, models: Path, name: str, folder: Path, *, source: str, report: Report
) -> Added:
    package = await asyncio.to_thread(modelstore.inspect, folder)
    gone = threading.Event()

    def progress(done: int, total: int) -> None:
        if gone.is_set():
            raise InterruptedError
        report("copying and hashing", done, total)

    try:
        model = await asyncio.to_thread(modelstore.put, package, models, name=name, source=source, progress=progress)
    finally:
        gone.set()  # if this was cancelled, the thread ends at its next chunk and clears away what it has copied
    registered = await admin.post("/models", {"name": name, "digest": model.digest, "source": source})
    return Added(registered, model, package.facts.warnings)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr if that is a terminal; silent otherwise."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@click.group()
def group() -> None:
    """Add, list and remove models."""


@group.command()
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--source", help="Where it comes from, for people; the path if not said.")
@json_option
def add(name: str, path: Path, source: str | None, as_json: bool) -> None:
    """Check a Hugging Face folder or a GGUF file and add it as NAME.

    Weights must be safetensors (a GGUF file is converted); pickles and code of a model's own are refused.
    """
    tree = settings()

    async def work(admin: http.AdminClient) -> Added:
        with progress_bar() as report:
            return await add_model(admin, tree, name, path, source=source, report=report)

    added = http.run(work, tree)
    for warning in added.warnings:
        click.echo(f"warning: {warning}", err=True)
    show(added.registered, as_json=as_json, says=_summary(added.model))


@group.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the models."""
    show_list(http.run(lambda admin: admin.all("/models")), _COLUMNS, as_json=as_json)


@group.command("show")
@click.argument("name")
@json_option
def show_(name: str, as_json: bool) -> None:
    """Show one model with its files."""
    model = http.run(lambda admin: admin.get(f"/models/{http.part(name)}"))
    if as_json:
        show(model, as_json=True)
        return
    files = [f"{file['path']} ({size(file['size'])})" for file in model.pop("files")]
    show({**model, "files": files}, as_json=False)


@group.command()
@click.argument("name")
@json_option
def remove(name: str, as_json: bool) -> None:
    """Forget a model that nothing uses, and its files unless another model has the same."""
    http.run(lambda admin: admin.delete(f"/models/{http.part(name)}"))
    show({"name": name}, as_json=as_json, says=f"model {name} is removed")


def _summary(model: Model) -> str:
    """What somebody who has just added a model wants to know, in three lines."""
    estimate = footprint.estimate(model, RuntimeArguments())
    return (
        f"model {model.name} is there: {model.architecture}, {number(model.parameters)} parameters, {model.dtype}\n"
        f"weights {size(model.weights_bytes)}, {number(model.kv_bytes_per_token)} bytes of KV cache a token, "
        f"context up to {number(model.max_model_len)} tokens\n"
        f"an engine with default settings takes about {size(estimate.total)}"
    )
