"""The command line: one module a noun, imported when its command is used, so that every start is quick.

A command gets its settings from `settings()`; what it refuses it raises as `Refused`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import rich_click as click

from app.settings import Settings, load

COMMANDS: Final[Mapping[str, str]] = {
    "up": "app.cli.up:up",
    "gateway": "app.cli.serve:gateway",
    "control": "app.cli.serve:control",
    "engine-host": "app.cli.serve:engine_host",
    "migrate": "app.cli.migrate:migrate",
    "doctor": "app.cli.doctor:doctor",
    "workspaces": "app.cli.workspaces:group",
    "keys": "app.cli.keys:group",
    "models": "app.cli.models:group",
    "variants": "app.cli.variants:group",
    "engines": "app.cli.engines:group",
    "usage": "app.cli.usage:usage",
    "chat": "app.cli.chat:chat",
}
"""Name → `module:attribute`."""


class _Commands(click.RichGroup):
    """Commands of `COMMANDS`, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.name = cmd_name  # the modules' groups are all called `group`
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="greenroom", message="greenroom %(version)s")
@click.option("--config", type=click.Path(path_type=Path), help="Settings file, instead of ./greenroom.toml.")
@click.option("--data-dir", help="Where everything that lasts is kept.")
@click.pass_context
def greenroom(ctx: click.Context, config: Path | None, data_dir: str | None) -> None:
    """Host chat models for many workspaces on few GPUs: awake in seconds, asleep when idle, exact usage."""
    ctx.obj = {"config": config, "data_dir": data_dir}


def settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """The settings from file, environment and flags (`gateway__port`; `None`: not given). Raises `SettingsInvalid`."""
    root = _root_options()
    given = {name.replace("__", "."): value for name, value in (flags or {}).items()}
    return load(os.environ, file=root.get("config"), flags={"data_dir": root.get("data_dir"), **given})


def _root_options() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    options: dict[str, Any] = (context.find_root().obj or {}) if context else {}
    return options
