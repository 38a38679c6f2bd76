"""`greenroom variants`: what workspaces name in `"model"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import rich_click as click

from app.cli import http
from app.cli.engines import stop_pool
from app.cli.output import Columns, json_option, show, show_list, size

F = TypeVar("F", bound=Callable[..., Any])


class _Field(NamedTuple):
    """An option that sets a field of one of the variant's parts."""

    option: str
    part: str
    field: str
    type: Any
    help: str


_FIELDS: Final = (
    _Field("--system-prompt", "defaults", "system_prompt", str, "For requests without a system message of their own."),
    _Field("--temperature", "defaults", "temperature", float, "Where a request says none."),
    _Field("--top-p", "defaults", "top_p", float, "Where a request says none."),
    _Field("--max-tokens", "defaults", "max_tokens", int, "Where a request says none."),
    _Field("--idle-timeout", "scaling", "idle_timeout_s", float, "Seconds without use after which its engines leave."),
    _Field("--provisioned", "scaling", "provisioned", int, "Requests that can always start at once."),
    _Field("--max-concurrency", "scaling", "max_concurrency", int, "Most requests of its own at a time."),
    _Field("--max-model-len", "arguments", "max_model_len", int, "Longest context in tokens."),
    _Field("--max-num-seqs", "arguments", "max_num_seqs", int, "Slots of an engine."),
    _Field("--max-num-batched-tokens", "arguments", "max_num_batched_tokens", int, "Tokens of one step of an engine."),
    _Field("--kv-cache-bytes", "arguments", "kv_cache_bytes", int, "KV cache of an engine."),
    _Field("--dtype", "arguments", "dtype", str, "auto, bfloat16, float16 or float32."),
    _Field("--threads", "arguments", "threads", int, "OpenMP threads of an engine."),
    _Field("--eager/--compiled", "arguments", "enforce_eager", bool, "Start quickly, or run quickly."),
)

_COLUMNS: Columns = {
    "name": lambda variant: variant["name"],
    "model": lambda variant: variant["model"],
    "pool": lambda variant: variant["pool"],
    "provisioned": lambda variant: variant["scaling"]["provisioned"],
    "idle time-out": lambda variant: f"{variant['scaling']['idle_timeout_s']:g} s",
    "slots": lambda variant: variant["arguments"]["max_num_seqs"],
    "engine": lambda variant: size(variant["footprint"]["total"]),
}


def _fields(command: F) -> F:
    """The options of `_FIELDS`, and `--dedicated`."""
    for field in reversed(_FIELDS):
        option = click.option(
            field.option, f"{field.part}__{field.field}", type=field.type, default=None, help=field.help
        )
        command = option(command)
    dedicated = click.option("--dedicated/--shared", default=None, help="Engines of its workspace's own.")
    return dedicated(command)


def _body(dedicated: bool | None, values: dict[str, Any], reset: Sequence[str] = ()) -> dict[str, Any]:
    """What was given, as the API takes it."""
    body: dict[str, Any] = {} if dedicated is None else {"dedicated": dedicated}
    for name, value in values.items():
        if value is not None:
            part, _, field = name.partition("__")
            body.setdefault(part, {})[field] = value
    for name in reset:
        part, _, field = name.partition(".")
        body.setdefault(part, {})[field] = None
    return body


def _path(workspace: str, name: str) -> str:
    return f"/workspaces/{http.part(workspace)}/variants/{http.part(name)}"


@click.group()
def group() -> None:
    """Make, change, list and warm up a workspace's variants."""


@group.command()
@click.argument("workspace")
@click.argument("name")
@click.option("--model", required=True, help="A model of `greenroom models list`.")
@_fields
@json_option
def create(workspace: str, name: str, model: str, as_json: bool, dedicated: bool | None, **values: Any) -> None:
    """Make a variant; an equal one that is there already is fine."""
    body = {"name": name, "model": model, **_body(dedicated, values)}
    made = http.run(lambda admin: admin.post(f"/workspaces/{http.part(workspace)}/variants", body))
    says = f"variant {name} of {workspace} is there; an engine for it takes {size(made['footprint']['total'])}"
    show(made, as_json=as_json, says=says)


@group.command("set")
@click.argument("workspace")
@click.argument("name")
@click.option("--model", help="Another model.")
@click.option("--reset", multiple=True, metavar="PART.FIELD", help="Back to the default, e.g. defaults.system_prompt.")
@_fields
@json_option
def set_(
    *,
    workspace: str,
    name: str,
    model: str | None,
    reset: tuple[str, ...],
    as_json: bool,
    dedicated: bool | None,
    **values: Any,
) -> None:
    """Change a variant; what isn't named stays as it is."""
    body = _body(dedicated, values, reset)
    if model is not None:
        body["model"] = model
    if not body:
        raise click.UsageError("nothing to change was named")
    show(http.run(lambda admin: admin.patch(_path(workspace, name), body)), as_json=as_json)


@group.command("list")
@click.argument("workspace")
@json_option
def list_(workspace: str, as_json: bool) -> None:
    """List a workspace's variants. Those with an equal pool share engines."""
    found = http.run(lambda admin: admin.all(f"/workspaces/{http.part(workspace)}/variants"))
    show_list(found, _COLUMNS, as_json=as_json)


@group.command("show")
@click.argument("workspace")
@click.argument("name")
@json_option
def show_(workspace: str, name: str, as_json: bool) -> None:
    """Show one variant."""
    show(http.run(lambda admin: admin.get(_path(workspace, name))), as_json=as_json)


@group.command()
@click.argument("workspace")
@click.argument("name")
@json_option
def remove(workspace: str, name: str, as_json: bool) -> None:
    """Forget a variant; requests that name it get 404 from now on."""
    http.run(lambda admin: admin.delete(_path(workspace, name)))
    show({"workspace": workspace, "name": name}, as_json=as_json, says=f"variant {name} of {workspace} is removed")


@group.command()
@click.argument("workspace")
@click.argument("name")
@json_option
def prewarm(workspace: str, name: str, as_json: bool) -> None:
    """Have an engine ready before somebody asks; counts as use."""
    variant = http.run(lambda admin: admin.post(f"{_path(workspace, name)}/prewarm"))
    show(variant, as_json=as_json, says="the controller was asked; `greenroom engines list` shows what comes")


@group.command()
@click.argument("workspace")
@click.argument("name")
@click.option("--force", is_flag=True, help="Without waiting for requests to end.")
@json_option
def stop(workspace: str, name: str, force: bool, as_json: bool) -> None:
    """Stop the engines that serve a variant, for all who share them. The next request starts one again."""

    async def work(admin: http.AdminClient) -> list[Any]:
        variant = await admin.get(_path(workspace, name))
        return await stop_pool(admin, variant["pool"], force=force)

    stopped = http.run(work)
    if as_json:
        show_list(stopped, {}, as_json=True)
    else:
        click.echo(f"the controller was asked to stop {len(stopped)} engine{'' if len(stopped) == 1 else 's'}")
